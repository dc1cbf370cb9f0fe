"""Opening: any range of the payload, chunk by chunk, and no byte of a chunk before all of it is verified."""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography.exceptions import InvalidTag

from obfuscatune.errors import SealError, UsageError
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.sealed.fields import HASH_BYTES, TAG_BYTES, Header
from obfuscatune.parties.sealed.header import open_file, read_exactly, read_signed
from obfuscatune.parties.sealed.keys import chunk_nonce, payload_cipher, unwrap_key


class SealedReader:
    """A sealed file, open for one of its recipients. Memory: two chunks and 32 bytes for each chunk of the file.

    What the file holds may change under the reader's hands: each chunk is copied once, then compared with the table of
    hashes that was verified on opening, then decrypted. Not for several threads at once.

    Args:
        path: of the sealed file. identity: one of its recipients.

    Attributes:
        header: the record. digest: 64 hex digits, what a job names.

    Raises:
        UsageError: it cannot be read. FormatError: it is no sealed file of this version.
        SealError: cut, changed, or not sealed to ``identity``.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self._what = f"sealed file {path}"
        self._file = open_file(path)
        try:
            signed = read_signed(self._file, path)
            self._cipher = payload_cipher(unwrap_key(signed.header, identity), signed.header_hash)
        except BaseException:
            self._file.close()
            raise
        self.header: Header = signed.header
        self.digest: str = signed.digest
        self._table, self._offset = signed.table, signed.payload_offset
        self._sealed = bytearray(self.header.chunk_size(0) + TAG_BYTES)
        self._plain = bytearray(self.header.chunk_size(0))
        self._cached: int | None = None

    @property
    def sender(self) -> PublicIdentity:
        """Who signed the file; compare the fingerprint with whom you expect."""
        return self.header.sender

    @property
    def terms(self) -> dict[str, Any] | None:
        """The sender's conditions."""
        return self.header.terms

    @property
    def payload_bytes(self) -> int:
        """Plain bytes of the payload."""
        return self.header.payload_bytes

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of the payload from ``offset`` on. Secret. Raises as :meth:`read_into`."""
        self._check(offset, length)
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``, of bytes, with the payload from ``offset`` on.

        Raises:
            UsageError: a range beyond the payload. SealError: a chunk of the range was changed or cut.
        """
        self._check(offset, len(buffer))
        done = 0
        while done < len(buffer):
            index, start = divmod(offset + done, self.header.chunk_bytes)
            part = self._chunk(index)[start : start + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.payload_bytes:
            raise UsageError("a range beyond the payload", got=(offset, length), expected=f"{self.payload_bytes} bytes")

    def _chunk(self, index: int) -> memoryview:
        size = self.header.chunk_size(index)
        plain = memoryview(self._plain)[:size]
        if index == self._cached:
            return plain
        self._cached = None  # decrypting writes into the buffer before it knows that the tag is right
        sealed = memoryview(self._sealed)[: size + TAG_BYTES]
        read_exactly(self._file, self._offset + index * (self.header.chunk_bytes + TAG_BYTES), sealed, self._what)
        if hashlib.sha256(sealed).digest() != self._table[index * HASH_BYTES : (index + 1) * HASH_BYTES]:
            raise SealError(f"{self._what} was changed", got=f"chunk {index} that is not the one in the signed table")
        try:
            self._cipher.decrypt_into(chunk_nonce(index, self.header.chunks), sealed, None, plain)
        except InvalidTag:
            raise SealError(f"{self._what} was sealed wrongly", got=f"chunk {index} that does not decrypt") from None
        self._cached = index
        return plain

    def close(self) -> None:
        """Close the file and forget the last chunk."""
        self._file.close()
        self._cached = None
        self._plain[:] = bytes(len(self._plain))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
