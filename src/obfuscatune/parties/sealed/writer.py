"""Sealing: one pass over the payload, in bounded memory, written beside and renamed."""

import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from obfuscatune.errors import StorageError, UsageError
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.sealed.fields import CHUNK_SIZES, MAX_RECIPIENTS, TAG_BYTES, Header, Kind, header_hash
from obfuscatune.parties.sealed.header import CONTEXT, digest, signed_hashes
from obfuscatune.parties.sealed.keys import DATA_KEY_BYTES, chunk_nonce, commitment, payload_cipher, wrap_key


class SealedWriter:
    """A sealed file in the making, for ``with``: :meth:`write` exactly ``payload_bytes``, then read :attr:`digest`.

    Nothing is at ``path`` before the block has ended without an exception; then a file that was there is replaced.
    Mode 0600. Data key and id are fresh, from the system's generator; one writer makes one file.

    Args:
        path: of the sealed file. kind: what the payload is. sender: signs. recipients: 1 to 16 who can open it.
        payload_bytes: known in advance, because the header comes first. terms: the owner's conditions, signed too.
        chunk_bytes: a power of two from 4 KiB to 1 MiB.

    Raises:
        FormatError: an argument that no reader would take. ObfuscatuneError: the disk refuses.
        UsageError: another number of bytes written than announced.
    """

    def __init__(
        self,
        path: Path,
        *,
        kind: Kind,
        sender: Identity,
        recipients: Sequence[PublicIdentity],
        payload_bytes: int,
        terms: dict[str, Any] | None = None,
        chunk_bytes: int = CHUNK_SIZES[-1],
    ) -> None:
        if not 1 <= len(recipients) <= MAX_RECIPIENTS:
            raise UsageError("recipients of a sealed file", got=len(recipients), expected=f"1 to {MAX_RECIPIENTS}")
        data_key, file_id, fingerprint = os.urandom(DATA_KEY_BYTES), os.urandom(32), sender.public.fingerprint
        self.header = Header(
            kind=kind,
            id=file_id,
            created=int(time.time()),
            chunk_bytes=chunk_bytes,
            payload_bytes=payload_bytes,
            sender=sender.public,
            recipients=tuple(
                wrap_key(data_key, recipient, file_id=file_id, kind=kind, sender=fingerprint)
                for recipient in recipients
            ),
            commitment=commitment(data_key, file_id),
            terms=terms,
        )
        self._head = self.header.to_bytes()  # refuses what a reader would refuse, before anything is on the disk
        self._hash = header_hash(self._head)
        self._cipher = payload_cipher(data_key, self._hash)
        self._path, self._sender, self._digest = Path(path), sender, ""
        self._plain, self._sealed = bytearray(chunk_bytes), bytearray(chunk_bytes + TAG_BYTES)
        self._index = self._filled = 0
        self._table = bytearray()
        self._file: BinaryIO | None = None

    @property
    def digest(self) -> str:
        """The digest of the finished file, 64 hex digits."""
        if not self._digest:
            raise UsageError("a sealed file has no digest before it is finished")
        return self._digest

    def __enter__(self) -> Self:
        if self._file is not None:  # a second file under the same key would use every nonce twice
            raise UsageError("a writer makes one sealed file")
        try:
            descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.", suffix=".part")
        except OSError as error:
            raise self._failed(error) from None
        self._beside = Path(name)
        self._file = os.fdopen(descriptor, "wb")
        try:
            self._put(self._head)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Add to the payload; raises UsageError for more than was announced."""
        view = memoryview(data).cast("B")
        # After a short last chunk the product is beyond the payload, and an empty file may still follow.
        if len(view) and self._index * self.header.chunk_bytes + self._filled + len(view) > self.header.payload_bytes:
            raise UsageError("more payload than announced", expected=f"{self.header.payload_bytes} bytes")
        while len(view):
            size = self.header.chunk_size(self._index)
            taken = min(size - self._filled, len(view))
            self._plain[self._filled : self._filled + taken] = view[:taken]
            self._filled, view = self._filled + taken, view[taken:]
            if self._filled == size:
                self._seal_chunk(size)

    def _seal_chunk(self, size: int) -> None:
        plain, sealed = memoryview(self._plain)[:size], memoryview(self._sealed)[: size + TAG_BYTES]
        self._cipher.encrypt_into(chunk_nonce(self._index, self.header.chunks), plain, None, sealed)
        self._table += hashlib.sha256(sealed).digest()
        self._index, self._filled = self._index + 1, 0
        self._put(sealed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        if self._index != self.header.chunks:
            got = self._index * self.header.chunk_bytes + self._filled
            raise UsageError("less payload than announced", got=got, expected=f"{self.header.payload_bytes} bytes")
        hashes = signed_hashes(self._hash, self._table)
        self._put(self._table)
        self._put(self._sender.sign(CONTEXT, hashes))
        try:
            if self._file is not None:
                self._file.close()
            self._beside.replace(self._path)
        except OSError as error:
            raise self._failed(error) from None
        self._digest = digest(hashes)

    def _put(self, data: bytes | bytearray | memoryview) -> None:
        if self._file is None:
            raise UsageError("a writer is for `with`")
        try:
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from None

    def _discard(self) -> None:
        """Close and remove what lies beside; nothing is there any more once it has been renamed."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError:  # bytes that a full disk does not take; the file goes anyway
                pass
            finally:
                self._beside.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> StorageError:
        return StorageError("cannot write the sealed file", got=error.strerror, where=str(self._path))
