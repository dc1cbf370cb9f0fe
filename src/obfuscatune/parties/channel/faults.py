"""Errors across the channel: a code and a text, made from our own errors only.

The text of any other exception may hold content, so the peer learns of it that something failed, and no more.
"""

from typing import Any

from obfuscatune.errors import (
    AttestationError,
    BusyError,
    ConsentError,
    FormatError,
    ObfuscatuneError,
    ProtocolError,
    RollbackError,
    SealError,
    StorageError,
    UsageError,
    printable,
)

_CLASSES: dict[str, type[ObfuscatuneError]] = {
    "attestation": AttestationError,
    "busy": BusyError,
    "consent": ConsentError,
    "failed": ObfuscatuneError,
    "format": FormatError,
    "protocol": ProtocolError,
    "rollback": RollbackError,
    "seal": SealError,
    "storage": StorageError,
    "usage": UsageError,
}
_CODES = {kind: code for code, kind in _CLASSES.items()}
CODES = tuple(_CLASSES)
MAX_CHARS = 1000
_HINT = "\nhint: "


def to_fields(error: BaseException) -> dict[str, Any]:
    """Return ``error`` and ``message`` for the peer: the code of the nearest class, the text of our own errors only."""
    if not isinstance(error, ObfuscatuneError):
        return {"error": "failed", "message": "the request failed in the enclave"}
    code = next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
    return {"error": code, "message": printable(error, keep="\n")[:MAX_CHARS]}


def raise_from(fields: dict[str, Any], where: str) -> None:
    """Raise the error that ``fields`` tell of; returns where they tell of none.

    Raises:
        ObfuscatuneError: of the class that the code stands for.
        ProtocolError: an error in no known form.
    """
    if "error" not in fields:
        return
    code, message = fields["error"], fields.get("message")
    if code not in CODES or not isinstance(message, str) or len(message) > MAX_CHARS:
        raise ProtocolError("peer reports an error of an unknown form", where=where)
    text, _, hint = printable(message, keep="\n").partition(_HINT)
    raise _CLASSES[code](text, where=where, hint=hint or None)
