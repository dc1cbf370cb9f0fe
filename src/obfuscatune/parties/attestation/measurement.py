"""The measurement of this program, for a platform that measures nothing: the simulator.

    measurement = SHA-384("obfuscatune code 1" || 0x00 || for each file, in the order of its path's bytes:
                          SHA-384(path) || SHA-384(content))

over the package's ``*.py`` files, paths relative to the package with ``/``. A changed, renamed, added or removed file
gives another measurement; the same installed version gives the same one on every machine. It says nothing of the
interpreter and the libraries, and the program that computes it could lie: real hardware measures from outside.
"""

import hashlib
from pathlib import Path

import obfuscatune
from obfuscatune.errors import AttestationError

MEASUREMENT_BYTES = 48
_DOMAIN = b"obfuscatune code 1\0"


def measure_code(package: Path | None = None) -> bytes:
    """Return the measurement, 48 bytes, of the files under ``package`` (where nothing is given, of this package).

    Raises:
        AttestationError: a file cannot be read, or there is none.
    """
    package = Path(obfuscatune.__file__).parent if package is None else package
    total = hashlib.sha384(_DOMAIN)
    try:
        files = sorted((path.relative_to(package).as_posix().encode(), path) for path in package.rglob("*.py"))
        for name, path in files:
            total.update(hashlib.sha384(name).digest() + hashlib.sha384(path.read_bytes()).digest())
    except OSError as error:
        raise AttestationError("cannot measure the program", got=error.strerror, where=str(package)) from None
    if not files:
        raise AttestationError("cannot measure the program: it has no source files", where=str(package))
    return total.digest()
