"""How many multiply-adds and numbers a call takes on either side, from shapes alone.

The share that stays in the enclave is what an accelerator cannot take over, so it is what a user with one pays for.
"""

from dataclasses import dataclass

from obfuscatune.enclave.keys.monarch import block_sizes
from obfuscatune.enclave.keys.rows import block_size, mixed_rows, round_count
from obfuscatune.enclave.mixing import padded_rows, tile_starts, tile_width
from obfuscatune.profiles import Profile


@dataclass(frozen=True, slots=True)
class CallCost:
    """Multiply-adds of the enclave and of the worker; numbers sent and received; rows and tiles of the call."""

    enclave: int
    worker: int
    sent: int
    received: int
    rows: int
    tiles: int


def mixed_call(rows: int, width: int, out: int, largest_tile: int) -> CallCost:
    """One mixed product of so many rows with a weight ``[width, out]``; keys and checks are not in it."""
    padded = padded_rows(rows)
    tile = tile_width(padded, width, largest_tile)
    tiles, total = len(tile_starts(width, tile)), mixed_rows(padded + tile)
    whitening = padded * tile**2 + tile**3 // 3
    noise = tile * tile * round_count(tile) * block_size(tile)
    mixing = total * (tile + out) * round_count(total) * block_size(total)
    return CallCost(
        enclave=tiles * (whitening + noise + mixing),
        worker=tiles * total * tile * out,
        sent=tiles * total * tile,
        received=tiles * total * out,
        rows=total,
        tiles=tiles,
    )


def of_keys(family: str, size: int, profile: Profile) -> int:
    """Multiply-adds of one key of that family and size, per row."""
    if family == "identity":
        return 0
    sizes = block_sizes(size, profile.key_block) if family == "monarch" else [size]
    return sum(block**2 for block in sizes) * (2 if len(sizes) > 1 else 1)
