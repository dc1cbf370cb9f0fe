"""Sealed files: what one party encrypts for others, and signs, so that it can lie on anybody's disk.

``docs/sealed-format.md`` is the format. From the outside in: `fields` is the header's record, `header` reads and
verifies a file without keys, `keys` is what is derived from the data key, `writer` and `reader` are the payload, and in
the payload `archive` holds named files and `tensors` reads single tensors of them.
"""

from obfuscatune.parties.sealed.archive import SealedArchive, seal_files
from obfuscatune.parties.sealed.header import SignedHeader, read_header
from obfuscatune.parties.sealed.reader import SealedReader
from obfuscatune.parties.sealed.writer import SealedWriter

__all__ = ["SealedArchive", "SealedReader", "SealedWriter", "SignedHeader", "read_header", "seal_files"]
