"""The C kernel of `c/`, where it was built: the arithmetic of shares, on both sides. Its calls free the GIL."""

import ctypes
import functools
import sysconfig
from pathlib import Path

BUILD_HINT = "a C compiler, then `pip install` or `make setup` again; the torch reference runs meanwhile, slowly"


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """Return the kernel; None where the package was built without a C compiler."""
    # The file of this interpreter alone: one of another lies there from another installation, and may be older.
    path = Path(__file__).parent / "c" / f"kernel{sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        found = ctypes.CDLL(str(path))
        for name in ("encode", "decode", "reduce", "expand", "few_rows", "pairs_product"):
            getattr(found, name).restype = ctypes.c_int64
    except (OSError, AttributeError):  # of another machine, or of another version
        return None
    return found
