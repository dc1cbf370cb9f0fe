"""The attested channel: TLS 1.3 to an enclave that has proved what it is, for parties known by their identities.

`docs/channel.md` is its specification.
"""

from obfuscatune.parties.channel.client import AttestedChannel, connect_attested, fetch_evidence
from obfuscatune.parties.channel.server import AttestedServer
from obfuscatune.parties.channel.transfer import Piece, download, serve_piece, upload

__all__ = [
    "AttestedChannel",
    "AttestedServer",
    "Piece",
    "connect_attested",
    "download",
    "fetch_evidence",
    "serve_piece",
    "upload",
]
