"""``protect()`` that fails leaves the model as it was, bit for bit, and nothing behind."""

import concurrent.futures
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import obfuscatune
from obfuscatune.enclave.session import Session
from obfuscatune.enclave.spawn import open_session
from obfuscatune.errors import KeyFaultError, UsageError, WorkerFault
from obfuscatune.protocol.connection import Connection

from .workers import Fields, Tensors, generate, loss_of, new_model, worker_in_a_thread


def state_of(model: Any) -> dict[str, Any]:
    """All that a caller can see of a model: configuration, modules, parameters' values and switches, hooks."""
    state: dict[str, Any] = {name: (type(m), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    state |= {f"{n} grad": p.requires_grad for n, p in model.named_parameters()}
    state |= {"config": model.config.to_dict(), "attention": model.config._attn_implementation}
    return state | {f"{n} value": t.clone() for n, t in model.state_dict().items()}


def assert_untouched(model: Any, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(after[name], value) if isinstance(value, torch.Tensor) else after[name] == value
        assert same, name
    loss_of(model).backward()
    assert any(p.grad is not None for p in model.parameters())
    generate(model)


@pytest.mark.parametrize("profile", ["plain", "naive", "paper", "balanced", "stream"])
@pytest.mark.parametrize("op", ["hello", "define", "hold"])
def test_worker_dies_while_weights_are_shipped(profile: str, op: str, tmp_path: Path) -> None:
    if op == "hold" and profile in ("plain", "balanced", "stream"):
        pytest.skip("LoRA is not held there")
    seen: list[str] = []

    def answer(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
        seen.append(request["op"])
        if seen.count(op) == (1 if op == "hello" else 3):
            connection.close()
        else:
            connection.send(reply, outputs)

    model = new_model()
    model.get_base_model().set_attn_implementation("eager")  # not the one that a protected model has
    before = state_of(model)
    with worker_in_a_thread(tmp_path, answer) as address:
        with pytest.raises(WorkerFault, match="the worker is gone") as caught:
            obfuscatune.protect(model, profile=profile, worker=address, timeout=60)
        assert caught.value.layer.startswith("-" if op == "hello" else "transformer.h.")
    assert_untouched(model, before)


def test_a_warning_that_is_an_error_leaves_the_model_too(tmp_path: Path) -> None:
    model = new_model()
    model.get_base_model().transformer.h[0].attn.attn_dropout.p = 0.1
    model.get_base_model().set_attn_implementation("eager")
    before = state_of(model)
    with worker_in_a_thread(tmp_path) as address, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="attn_pdrop > 0"):
            obfuscatune.protect(model, worker=address, timeout=60)
    assert_untouched(model, before)


@pytest.mark.parametrize("step", ["watch", "guard_tuners", "Protected"])
def test_an_interrupt_at_the_very_end_leaves_no_session(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[Session] = []

    def opened(*given: Any, **options: Any) -> Session:
        sessions.append(open_session(*given, **options))
        return sessions[-1]

    def interrupt(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("obfuscatune.enclave.protect.open_session", opened)
    monkeypatch.setattr(f"obfuscatune.enclave.protect.{step}", interrupt)
    with worker_in_a_thread(tmp_path) as address, pytest.raises(KeyboardInterrupt):
        obfuscatune.protect(new_model(), worker=address, timeout=60)
    assert [session.has_ended for session in sessions] == [True]


def test_a_model_that_failed_once_can_be_protected(tmp_path: Path) -> None:
    model = new_model()
    expected = loss_of(model)
    with pytest.raises(UsageError):
        obfuscatune.protect(model, worker=f"unix://{tmp_path}/nobody")
    with worker_in_a_thread(tmp_path) as address, obfuscatune.protect(model, worker=address, timeout=60) as protected:
        torch.testing.assert_close(loss_of(protected.model), expected)


@pytest.mark.parametrize("kind", ["no file", "a file", "a dead socket", "tcp"])
def test_no_worker_at_the_address(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w"
    address = f"unix://{path}"
    if kind == "a file":
        path.touch()
    elif kind == "a dead socket":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    elif kind == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    model = new_model()
    before = state_of(model)
    with pytest.raises(UsageError, match="no worker answers") as caught:
        obfuscatune.protect(model, worker=address, timeout=30)
    assert caught.value.where == address
    assert f"obfuscatune worker --listen {address}" in str(caught.value)
    assert_untouched(model, before)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["nothing", "something else"])
def test_what_listens_there_is_no_worker(says: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found within the time of a greeting, whatever the time for a result, and nobody is told to restart it."""
    monkeypatch.setattr("obfuscatune.enclave.session.GREETING_SECONDS", 0.2)
    model = new_model()
    with socket.create_server(("127.0.0.1", 0)) as listener, concurrent.futures.ThreadPoolExecutor() as threads:

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.recv(100)
                connection.sendall(says)
                while connection.recv(1000):
                    pass

        done = threads.submit(serve)
        with pytest.raises(WorkerFault, match="is an obfuscatune worker of this version what listens there"):
            obfuscatune.protect(model, worker=f"tcp://127.0.0.1:{listener.getsockname()[1]}", timeout=600)
        done.result(30)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense"])
def test_a_spawned_worker_that_refuses_its_device_is_no_fault(device: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="refuses its options\nhint: it says why, above"):
        obfuscatune.protect(new_model(), device=device, timeout=60)
    assert f"error: device not available: got {device}\n" in capfd.readouterr().err


def test_a_test_seed_is_refused_over_tcp_before_anything_is_sent() -> None:
    model = new_model()
    before = state_of(model)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with pytest.raises(KeyFaultError, match="a test seed is refused with a worker over a network"):
            obfuscatune.protect(
                model, worker=f"tcp://127.0.0.1:{listener.getsockname()[1]}", insecure_test_seed=1, timeout=30
            )
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert_untouched(model, before)


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        directory = tmp_path / str(number)
        directory.mkdir()

        def answer(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
            connection.close()

        with worker_in_a_thread(directory, answer) as address, pytest.raises(WorkerFault):
            obfuscatune.protect(new_model(), worker=address, timeout=60)
    assert len(os.listdir("/proc/self/fd")) == descriptors
