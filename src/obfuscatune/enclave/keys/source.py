"""Where all secret randomness comes from: one 32-byte master secret, HKDF per label, a ChaCha20 keystream per key.

Never torch's or numpy's default generators: Mersenne Twister and Philox states can be recovered or guessed from a seed.
Source: HKDF is RFC 5869, ChaCha20 is RFC 8439, Fisher-Yates is Knuth, TAOCP 3.4.2 P.
"""

import builtins
import math
import os
import re
import secrets
import stat
import threading
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from obfuscatune.durable import rename, write_new
from obfuscatune.errors import KeyFaultError, UsageError

SECRET_BYTES = 32
_CHUNK = 1 << 17  # numbers made per pass: 1 MiB of float64, so that the temporaries stay in cache
_TAGS = {False: "obfuscatune-master-secret-v1", True: "obfuscatune-insecure-test-secret-v1"}
_FILE = re.compile(rb"(%s|%s) ([0-9a-f]{64})\n" % (_TAGS[False].encode(), _TAGS[True].encode()))


class Secret:
    """Base of what must not leave by accident: refuses pickle, copy and ``torch.save``, hides its value in ``repr``."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: hidden>"

    def _refuse(self, *_: Any) -> NoReturn:
        raise KeyFaultError(
            "a secret may not be pickled or copied",
            got=type(self).__name__,
            hint="share the object itself, or derive it again from the master secret",
        )

    __reduce__ = __reduce_ex__ = __getstate__ = __copy__ = __deepcopy__ = _refuse


class Stream(Secret):
    """The ChaCha20 keystream of one 32-byte key, as bytes, numbers and permutations; every call continues it.

    The zero nonce is safe because each key comes from HKDF under its own label and encrypts one keystream only.
    Equal streams give equal draws; functions of normals agree between machines up to float64 rounding.
    """

    def __init__(self, key: builtins.bytes) -> None:
        self._keystream = Cipher(ChaCha20(key, nonce=builtins.bytes(16)), mode=None).encryptor()
        self._lock = threading.Lock()  # the library refuses two threads at once

    def bytes(self, n: int) -> builtins.bytes:
        """The next ``n`` bytes. Raises: `UsageError` if n is negative."""
        if n < 0:
            raise UsageError("a count of random numbers is negative", got=n)
        with self._lock:
            return self._keystream.update(builtins.bytes(n))

    def _words(self, n: int) -> Tensor:
        # bytearray, because torch.frombuffer warns about read-only memory
        return torch.frombuffer(bytearray(self.bytes(8 * n)), dtype=torch.int64) if n else torch.empty(0).long()

    def uniform(self, *shape: int) -> Tensor:
        """Independent uniforms in [0, 1), multiples of 2^-53, float64 of the given shape."""
        n = math.prod(shape)
        out = torch.empty(n, dtype=torch.float64)
        for chunk in torch.split(out, _CHUNK):
            chunk.copy_((self._words(len(chunk)) >> 11) & ((1 << 53) - 1)).mul_(2.0**-53)
        return out.view(shape)

    def normal(self, *shape: int) -> Tensor:
        """Independent N(0, 1), float64 of the given shape. Box-Muller: sqrt(-2 log(1 - u)) (cos, sin)(2 pi v)."""
        n = math.prod(shape)
        out = torch.empty(n + n % 2, dtype=torch.float64)
        for chunk in torch.split(out, _CHUNK):
            u, v = self.uniform(2, len(chunk) // 2)
            radius = torch.log1p(-u).mul_(-2).sqrt_()  # 1 - u lies in (0, 1], so the logarithm is finite
            angle = v.mul_(2 * math.pi)
            chunk.copy_(torch.cat([radius * angle.cos(), radius * angle.sin()]))
        return out[:n].view(shape)

    def permutation(self, n: int) -> Tensor:
        """A uniform permutation of 0..n-1, int64 [n]: Fisher-Yates, its indices exactly uniform by rejection."""
        tops = torch.arange(1, max(n, 1)).flip(0)  # step i swaps position tops[i] with a uniform one of 0..tops[i]
        masks = tops.clone()
        for shift in (1, 2, 4, 8, 16, 32):
            masks |= masks >> shift  # the smallest 2^k - 1 >= tops: a draw is kept with probability above 1/2
        picks, pending = torch.empty_like(tops), torch.arange(len(tops))
        while len(pending):
            draws = self._words(len(pending)) & masks[pending]
            kept = draws <= tops[pending]
            picks[pending[kept]] = draws[kept]
            pending = pending[~kept]
        order = list(range(n))
        for top, pick in zip(tops.tolist(), picks.tolist(), strict=True):
            order[top], order[pick] = order[pick], order[top]
        return torch.tensor(order, dtype=torch.int64)

    def permutations(self, count: int, n: int) -> Tensor:
        """Independent uniform permutations of 0..n-1, int64 [count, n], in one pass: the order of 64-bit words.

        Two equal words would make an order likelier than another; among n words that has a chance of n^2 / 2^65.
        """
        return self._words(count * n).view(count, n).argsort(dim=1)

    def signs(self, *shape: int) -> Tensor:
        """Independent uniform signs, float64 1 or -1, of the given shape."""
        n = math.prod(shape)
        bits = torch.frombuffer(bytearray(self.bytes(n)), dtype=torch.uint8) & 1 if n else torch.empty(0)
        return bits.double().mul_(2).sub_(1).view(shape)

    def indices(self, bound: int, *shape: int) -> Tensor:
        """Independent uniform integers in 0..bound-1, int64. Raises: `UsageError` unless bound is a power of two."""
        if bound < 1 or bound & (bound - 1):
            raise UsageError("a bound of random numbers is not a power of two", got=bound)
        return (self._words(math.prod(shape)) & (bound - 1)).view(shape)


class MasterSecret(Secret):
    """The 32 bytes that all keys of a run derive from; the only secret to be sealed.

    Args:
        value: 32 bytes from the operating system's generator, as `generate` draws them.
        is_test: marks a secret made from a seed, which protects nothing; kept by `save` and `load`.
    """

    def __init__(self, value: builtins.bytes, *, is_test: bool = False) -> None:
        if len(value) != SECRET_BYTES:
            raise UsageError("a master secret has the wrong length", got=len(value), expected=SECRET_BYTES)
        self._value = bytes(value)
        self.is_test = is_test

    @classmethod
    def generate(cls) -> Self:
        """A fresh secret from the operating system's generator."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def from_insecure_test_seed(cls, seed: int) -> Self:
        """A reproducible secret for tests: whoever guesses the seed has every key."""
        return cls(_hkdf(str(seed).encode(), b"obfuscatune insecure test seed"), is_test=True)

    def stream(self, *labels: str) -> Stream:
        """The stream of the labels (model hash, profile, epoch, layer, name), by HKDF-SHA256.

        Streams under other labels are independent; each label is preceded by its length, so that ("ab", "c") and
        ("a", "bc") differ.

        Raises: `UsageError` without labels.
        """
        if not labels:
            raise UsageError("a stream needs at least one label", got="none")
        encoded = [label.encode() for label in labels]
        info = b"".join(len(label).to_bytes(4, "big") + label for label in encoded)
        return Stream(_hkdf(self._value, b"obfuscatune stream v1" + info))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one line, ``<format-version> <hex>``, readable by the owner only; atomic, replaces an older file.

        Raises: OSError as the file system gives it.
        """
        path = Path(path)
        line = f"{_TAGS[self.is_test]} {self._value.hex()}\n".encode()
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            write_new(temporary, line)
            rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. Raises: `UsageError` if missing, malformed, or open to group or others."""
        where = os.fspath(path)
        try:
            with open(path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode  # of the open file: checking the path first would be a race
                match = _FILE.fullmatch(file.read(256))
        except OSError as error:
            raise UsageError("a master secret cannot be read", got=error.strerror, where=where) from None
        if not stat.S_ISREG(mode) or mode & 0o077:
            raise UsageError(
                "a master secret must be a file of its owner alone",
                got=stat.filemode(mode),
                expected="-rw-------",
                where=where,
                hint="if others could read it, make a new secret: chmod does not take back what was read",
            )
        if match is None:
            raise UsageError("a master secret is malformed", expected=f"'{_TAGS[False]} <64 hex digits>'", where=where)
        return cls(builtins.bytes.fromhex(match[2].decode()), is_test=match[1] == _TAGS[True].encode())


def _hkdf(value: builtins.bytes, info: builtins.bytes) -> builtins.bytes:
    return HKDF(algorithm=SHA256(), length=SECRET_BYTES, salt=None, info=info).derive(value)
