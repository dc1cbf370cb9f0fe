"""What must not leave by accident: nothing secret in a repr, and no copy or pickle of what holds secrets."""

import copy
import dataclasses
import importlib
import io
import pickle
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import obfuscatune
from obfuscatune.errors import KeyFaultError, UnsupportedModelError, WorkerFault

from .recording import Recording, new_model, recording_worker


@pytest.fixture(scope="module", params=["paper", "balanced", "stream"])
def protected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("hygiene") / "worker"
    with (
        recording_worker(path, Recording()) as address,
        obfuscatune.protect(new_model(), profile=request.param, worker=address, timeout=60) as protected,
    ):
        yield protected


def objects_of(protected: Any) -> dict[str, Any]:
    modules = [m for m in protected.model.modules() if type(m).__module__.startswith("obfuscatune.enclave.remote")]
    parts = {type(module).__name__: module for module in modules}
    for holders in (modules, [m.group for m in modules if hasattr(m, "group")]):
        for holder in holders:
            parts |= {type(value).__name__: value for value in vars(holder).values() if not isinstance(value, Tensor)}
    assert "Placed" in parts
    return {
        "Protected": protected,
        "Session": protected.session,
        "MasterSecret": protected.secret,
        "stream": protected.secret.stream("x"),
        "optimizer": protected.create_optimizer("sgd", lr=0.5),
        **parts,
    }


def test_no_repr_shows_a_number_of_a_secret(protected: Any) -> None:
    secret = bytes(protected.secret._value)
    for name, thing in objects_of(protected).items():
        for text in (repr(thing), str(thing), f"{thing}"):
            assert "tensor(" not in text, name
            assert secret.hex()[:8] not in text.lower(), name
            assert not re.search(r"\d\.\d{3,}", text), f"{name} shows a float"


def test_no_dataclass_of_the_package_shows_a_tensor_in_its_repr() -> None:
    seen, faults = 0, []
    for info in pkgutil.walk_packages(obfuscatune.__path__, "obfuscatune."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for thing in vars(module).values():
            if not (isinstance(thing, type) and dataclasses.is_dataclass(thing) and thing.__module__ == info.name):
                continue
            hints = [re.sub(r"Callable\[.*Tensor\]", "", str(field.type)) for field in dataclasses.fields(thing)]
            if any("Tensor" in hint for hint in hints):  # a function that makes one shows none
                seen += 1
                if "__repr__" in vars(thing):
                    faults.append(f"{info.name}.{thing.__name__}")
    assert seen
    assert not faults, f"@dataclass(repr=False), or its repr shows tensors: {faults}"


@pytest.mark.parametrize(
    "leave",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda thing: torch.save(thing, io.BytesIO())],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("name", ["Session", "MasterSecret", "stream"])
def test_secrets_and_sessions_are_not_copied(protected: Any, name: str, leave: Any) -> None:
    with pytest.raises(KeyFaultError, match="may not be pickled or copied"):
        leave(objects_of(protected)[name])


@pytest.mark.parametrize(
    "leave",
    [copy.deepcopy, pickle.dumps, lambda thing: torch.save(thing, io.BytesIO())],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_protected_model_is_not_copied(protected: Any, leave: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="neither copied nor pickled"):
        leave(protected.model)


def test_the_plain_model_may_be_copied() -> None:
    assert isinstance(pickle.loads(pickle.dumps(copy.deepcopy(new_model()))), torch.nn.Module)  # noqa: S301


def test_a_saved_adapter_holds_neither_keys_nor_weights(protected: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    protected.model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert names
    assert all("lora_" in name for name in names)


def test_a_fault_says_where_and_no_number_of_a_tensor() -> None:
    fault = WorkerFault("shape of y", worker="unix:///w", layer="h.0.attn", call=7, got="[1, 2]", expected="[2, 1]")
    text = "shape of y: got [1, 2], expected [2, 1] (at worker unix:///w, layer h.0.attn, call 7)"
    assert str(fault).splitlines()[0] == text
    assert (fault.worker, fault.layer, fault.call) == ("unix:///w", "h.0.attn", 7)
