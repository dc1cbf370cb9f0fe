"""What one frame may ask of the side that reads it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Upper bounds of one frame, checked before anything is allocated for it.

    The same bounds hold for what is sent, so that an oversized request fails on the side that made it.
    """

    max_header_bytes: int = 256 * 1024
    max_payload_bytes: int = 2 * 1024**3
    max_tensors: int = 4096  # LoRA factors and moments of a model of 48 layers, exported at once, are 1536
    max_dims: int = 6
    max_name_chars: int = 128
    max_depth: int = 5  # nested maps and lists of the user's fields, the header map itself counting as one
    max_items: int = 4096  # values in all maps and lists of the user's fields together


DEFAULT_LIMITS = Limits()
