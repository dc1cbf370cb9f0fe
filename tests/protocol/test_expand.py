"""A seed gives ChaCha20's numbers below each prime, with the kernel and without; hostile fields are refused."""

from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol import expand as module
from obfuscatune.protocol.expand import SEED_BYTES, drawn, expand, keystream, tensors_drawn
from obfuscatune.protocol.native import kernel
from obfuscatune.protocol.residues import PRIMES

SEED = bytes(range(SEED_BYTES))


def other_keystream(seed: bytes, nonce: int, batches: int) -> bytes:
    """OpenSSL's ChaCha20, sixteen blocks at a time, word by word."""
    start = (0).to_bytes(4, "little") + nonce.to_bytes(12, "little")
    stream = Cipher(ChaCha20(seed, start), None).encryptor().update(bytes(1024 * batches))
    return np.frombuffer(stream, dtype="<u4").reshape(batches, 16, 16).swapaxes(1, 2).tobytes()


@pytest.mark.parametrize("nonce", [0, 7])
def test_the_keystream_is_chacha20(nonce: int) -> None:
    whole = other_keystream(SEED, nonce, 5)
    assert keystream(SEED, nonce, 0, 5).tobytes() == whole
    assert keystream(SEED, nonce, 32, 3).tobytes() == whole[2048:]


def test_residues_are_its_bytes_below_the_prime() -> None:
    made = expand(SEED, PRIMES, (11, 70))
    for i, p in enumerate(PRIMES):
        mask = 127 if p < 128 else 255
        kept = [b & mask for b in other_keystream(SEED, i, 3) if b & mask < p][:770]
        assert made[i].flatten().tolist() == [b - p if b > p // 2 else b for b in kept]


@given(st.binary(min_size=32, max_size=32), st.integers(1, 70), st.integers(1, 90), st.integers(1, 7))
def test_the_kernel_gives_what_the_reference_gives(seed: bytes, rows: int, columns: int, primes: int) -> None:
    if kernel() is None:
        pytest.skip("the kernel was not built: no C compiler")
    found = expand(seed, PRIMES[-primes:], (rows, columns))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kernel", lambda: None)
        assert torch.equal(expand(seed, PRIMES[-primes:], (rows, columns)), found)


def test_a_field_gives_its_tensors_and_its_planes_are_apart() -> None:
    made = tensors_drawn({"x": drawn(SEED, PRIMES[:2], (40, 50)), "y": drawn(bytes(32), PRIMES[:1], (1, 1))}, 1 << 20)
    assert torch.equal(made["x"], expand(SEED, PRIMES[:2], (40, 50))) and made["y"].shape == (1, 1, 1)
    same = tensors_drawn({"x": drawn(SEED, [251, 251], (40, 50))}, 1 << 20)["x"]
    assert not torch.equal(same[0], same[1])


GOOD = {"seed": "00" * 32, "primes": [251, 83], "shape": [3, 4]}


@pytest.mark.parametrize(
    "field",
    [
        None,
        {},
        [GOOD],
        {str(i): GOOD for i in range(9)},
        {"x": None},
        {"x": {**GOOD, "more": 1}},
        {"x": {"seed": "00" * 32, "primes": [251]}},
        *({"x": {**GOOD, "seed": seed}} for seed in ("00" * 31, "0x" * 32, "é" * 64, 7, None, " " * 64)),
        *({"x": {**GOOD, "primes": primes}} for primes in ([], [2], [127], [251.0], [True], "251", [251] * 9, None)),
        *(
            {"x": {**GOOD, "shape": shape}}
            for shape in ([], [3], [3, 4, 5], [0, 4], [-1, -4], [3, 4.0], [1 << 40, 1], "34")
        ),
    ],
)
def test_other_fields_are_refused_and_no_seed_is_quoted(field: Any) -> None:
    with pytest.raises(ProtocolError) as refused:
        tensors_drawn(field, 1 << 40)
    assert "00" * 31 not in str(refused.value)


def test_no_more_is_made_than_may_be() -> None:
    field = {"x": GOOD, "y": GOOD}
    assert len(tensors_drawn(field, 48)) == 2
    with pytest.raises(ProtocolError, match="48 bytes"):
        tensors_drawn(field, 47)
    with pytest.raises(ProtocolError, match="bytes"):  # and at once
        tensors_drawn({"x": {**GOOD, "shape": [1 << 24, 1 << 19]}}, 2 << 30)
