"""Keys at rest: a secret identity file under a passphrase, and where the passphrase comes from.

    canonical JSON of {"box", "format": "obfuscatune identity 1 locked", "log2_n", "nonce", "public", "salt"}
    key = scrypt(passphrase in UTF-8, salt of 16 bytes, n = 2^log2_n, r = 8, p = 1), 32 bytes      (RFC 7914)
    box = AES-256-GCM(key, nonce of 12 bytes, the open file's content, associated data: all else of the record)

At 2^17 a guess takes 128 MiB and some tenths of a second. The passphrase is asked at the terminal, or read from the
file that OBFUSCATUNE_PASSPHRASE_FILE names: mode 0600, made by a secret manager or by systemd's LoadCredential=.
"""

import base64
import getpass
import os
import sys
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from obfuscatune.errors import FormatError, SealError, UsageError
from obfuscatune.parties.canonical import encode, unbase64
from obfuscatune.parties.files import read_small

FORMAT = "obfuscatune identity 1 locked"
VARIABLE = "OBFUSCATUNE_PASSPHRASE_FILE"
LEAST_CHARS = 12
_LOG2_N, _LOG2_RANGE = 17, range(14, 19)  # 16 to 256 MiB: a file must not take the machine's memory
_NAMES = {"box", "format", "log2_n", "nonce", "public", "salt"}
_MAX_PASSPHRASE_BYTES = 1024


def lock(content: bytes, public: dict[str, Any], passphrase: str, *, log2_n: int = _LOG2_N) -> bytes:
    """Return the locked file of an open one; ``public`` stays readable, so that a locked key tells whose it is.

    Raises:
        UsageError: a passphrase of fewer than `LEAST_CHARS` characters.
    """
    if len(passphrase) < LEAST_CHARS:
        raise UsageError("passphrase is too short", expected=f"at least {LEAST_CHARS} characters")
    salt, nonce = os.urandom(16), os.urandom(12)
    record: dict[str, Any] = {
        "format": FORMAT,
        "log2_n": log2_n,
        "nonce": base64.b64encode(nonce).decode(),
        "public": public,
        "salt": base64.b64encode(salt).decode(),
    }
    box = AESGCM(_key(passphrase, salt, log2_n)).encrypt(nonce, content, encode(record))
    return encode({**record, "box": base64.b64encode(box).decode()})


def unlock(fields: dict[str, Any], passphrase: str, what: str) -> bytes:
    """Return the content of the open file.

    Raises:
        FormatError: not a locked identity of this version. SealError: another passphrase, or changed.
    """
    if set(fields) != _NAMES or fields["format"] != FORMAT:
        raise FormatError(f"{what} is no locked identity", expected=FORMAT)
    if type(fields["log2_n"]) is not int or fields["log2_n"] not in _LOG2_RANGE:
        raise FormatError(f"{what}: work of its passphrase", expected=f"{_LOG2_RANGE[0]} to {_LOG2_RANGE[-1]}")
    salt, nonce, box = (unbase64(fields[name], what) for name in ("salt", "nonce", "box"))
    if len(salt) != 16 or len(nonce) != 12:
        raise FormatError(f"{what}: salt or nonce of a wrong size")
    record = {name: value for name, value in fields.items() if name != "box"}
    problem: SealError | None = None
    try:
        return AESGCM(_key(passphrase, salt, fields["log2_n"])).decrypt(nonce, box, encode(record))
    except InvalidTag:
        hint = (
            "enter it again; if it is lost, nobody can restore it: make a new identity, and have the members remove "
            "this one"
        )
        problem = SealError(f"{what} does not open", got="another passphrase, or it was changed", hint=hint)
    raise problem


def known_passphrase(what: str) -> str:
    """Return the passphrase of a locked file: from the file of the environment, or asked at the terminal.

    Raises:
        UsageError: there is neither, or the file cannot be read, is empty, or others can read it.
    """
    if path := os.environ.get(VARIABLE):
        data = read_small(Path(path), _MAX_PASSPHRASE_BYTES, "passphrase file", private=True)
        try:
            if passphrase := data.decode("utf-8").rstrip("\r\n"):
                return passphrase
            hint = "a pipe can be read once; a command that opens one key and locks another needs a file of mode 0600"
            raise UsageError("passphrase file is empty", where=path, hint=hint)
        except UnicodeDecodeError:
            problem = UsageError("passphrase file is not UTF-8", where=path)
        raise problem
    if not sys.stdin.isatty():
        hint = f"{VARIABLE}=FILE names a file of mode 0600 with the passphrase"
        raise UsageError(f"no terminal to ask for the passphrase of {what}", hint=hint)
    return _ask(f"passphrase of {what}: ")


def new_passphrase(what: str) -> str:
    """Return a new passphrase: from the file of the environment, or asked twice; raises as `known_passphrase`."""
    first = known_passphrase(what)
    if not os.environ.get(VARIABLE) and _ask("again: ") != first:
        raise UsageError("the two passphrases differ")
    return first


def _ask(question: str) -> str:
    try:
        return getpass.getpass(question)
    except EOFError:
        raise UsageError("no passphrase") from None


def _key(passphrase: str, salt: bytes, log2_n: int) -> bytes:
    return Scrypt(salt=salt, length=32, n=1 << log2_n, r=8, p=1).derive(passphrase.encode("utf-8", "surrogatepass"))
