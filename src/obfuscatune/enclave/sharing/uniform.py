"""Uniform residues: the masks. AES-256-CTR bytes of seven bits, rejected where they are not below the prime.

``byte % p`` would be biased. Each stream has a key of its own from the operating system's generator, and a new one
after `_REKEY_BYTES`: the keystream of a block cipher never repeats a block, which is told from uniform bytes with a
chance of q^2 / 2^129 after q blocks: 2^-65 at 2^32 of them. In a forked process the key is drawn anew, because two
calls must never share a mask. Source: NIST SP 800-38A; rejection: von Neumann.
"""

import ctypes
import os
import secrets
import threading

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from torch import Tensor

from obfuscatune.enclave.keys.source import Secret, Stream
from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.protocol.native import kernel

_CHUNK = 1 << 18  # bytes of keystream at a time, which stay in the cache
_REKEY_BYTES = 1 << 36
_ZEROS = bytes(_CHUNK)


class Uniform(Secret):
    """Draws residues; for any number of threads.

    Args:
        test_stream: gives the keys instead of the system's generator: for tests only.
    """

    def __init__(self, test_stream: Stream | None = None) -> None:
        self._keys = secrets.token_bytes if test_stream is None else test_stream.bytes
        self._lock = threading.Lock()
        self._buffer = bytearray(_CHUNK + 15)
        self._start()

    def _start(self) -> None:
        self._encryptor = Cipher(AES(self._keys(32)), CTR(bytes(16))).encryptor()
        self._left, self._process = _REKEY_BYTES, os.getpid()

    def number(self) -> str:
        """Return the number of a sharing, which is not secret: 32 hexadecimal digits that no other has."""
        return self._keys(16).hex()

    def draw(self, scheme: Scheme, *shape: int) -> Tensor:
        """Return uniform centred residues, int8 ``[L, *shape]``."""
        out = torch.empty(len(scheme.primes), *shape, dtype=torch.int8)
        with self._lock:
            if self._process != os.getpid():
                self._start()
            for plane, p in zip(out, scheme.primes, strict=True):
                self._fill(plane.view(-1), p)
        return out

    def _fill(self, out: Tensor, p: int) -> None:
        filled = 0
        while filled < len(out):
            missing = len(out) - filled
            count = min(_CHUNK, missing * 128 // p + 4 * int(missing**0.5) + 64)  # enough, but for one draw in many
            if self._left < count:
                self._start()
            self._left -= count
            self._encryptor.update_into(memoryview(_ZEROS)[:count], self._buffer)
            filled += keep_below(self._buffer, count, p, out[filled:])


def keep_below(source: bytearray, count: int, p: int, out: Tensor) -> int:
    """Put those of the first ``count`` bytes, masked to 7 bits, that are below p into out, centred; return how many."""
    native = kernel()
    if native is None:
        found = torch.frombuffer(source, dtype=torch.uint8)[:count] & 127
        found = found[found < p][: len(out)].to(torch.int16)
        out[: len(found)] = torch.where(found > p // 2, found - p, found).to(torch.int8)
        return len(found)
    pointer = (ctypes.c_char * count).from_buffer(source)
    n, wanted = ctypes.c_int64(count), ctypes.c_int64(len(out))
    return int(native.keep_below(pointer, n, p, ctypes.c_void_p(out.data_ptr()), wanted))
