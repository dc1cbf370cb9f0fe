"""How idle threads wait is chosen before torch is loaded, or the user is told."""

import os
import subprocess
import sys
import warnings

import pytest

from obfuscatune.protocol.waiting import WAITING

from ..exactness.models import gpt2


def chosen_by(imports: str, **environment: str) -> str:
    """What the variables are in a process that begins with these imports."""
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    program = f"import {imports}, os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout.strip()


def test_it_is_chosen_before_torch_is_loaded_and_where_nobody_has() -> None:
    assert chosen_by("obfuscatune, torch") == "passive 1000"
    assert chosen_by("torch, obfuscatune") == "None None"
    assert chosen_by("obfuscatune", OMP_WAIT_POLICY="active") == "active None"


@pytest.mark.parametrize("chosen", [True, False])
def test_a_worker_of_the_same_machine_is_warned_of(chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from obfuscatune import protect

    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        protect(gpt2(n_layer=1), worker="spawn").close()
    assert [("import obfuscatune first" in str(one.message)) for one in caught] == [True] * (not chosen)
