"""The compiled part that is loaded is this interpreter's, whatever else lies beside it."""

import shutil
import sysconfig
from pathlib import Path

import pytest

from obfuscatune.protocol import native

OWN = f"kernel{sysconfig.get_config_var('EXT_SUFFIX')}"
BUILT = Path(native.__file__).parent / "c" / OWN


@pytest.mark.skipif(not BUILT.exists(), reason="the package was built without a C compiler")
def test_a_kernel_of_another_interpreter_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c").mkdir()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    # It would load, and it comes first by its name.
    shutil.copy(BUILT, tmp_path / "c" / "kernel.cpython-310-x86_64-linux-gnu.so")
    assert native.kernel.__wrapped__() is None
    shutil.copy(BUILT, tmp_path / "c" / OWN)
    found = native.kernel.__wrapped__()
    assert found is not None and found._name == str(tmp_path / "c" / OWN)
