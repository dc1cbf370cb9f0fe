"""What goes to a GPU and back: page-locked memory, one wait for a reply, and a mask once for all layers of a pass.

Without a GPU a CPU stands for one here, and what is asked of torch is noted; the last test needs a real one.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import obfuscatune
from obfuscatune.enclave.session import Session
from obfuscatune.protocol.bits import pack_mask, unpack_mask
from obfuscatune.protocol.connection import Connection
from obfuscatune.worker.server import serve_connection

from ..faults.workers import IDS, loss_of, new_model, worker_in_a_thread

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*protect nothing:UserWarning")


class Gpu:
    """What was asked of it. Attributes: ``pinned``, addresses of page-locked tensors; ``waits``, how often for it."""

    def __init__(self) -> None:
        self.pinned: set[int] = set()
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Let the CPU pass for a GPU, for the copies to it and from it."""
    found, empty = Gpu(), torch.empty

    def noting(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        if pin_memory:
            found.pinned.add(made.data_ptr())
        return made

    monkeypatch.setattr("obfuscatune.worker.transfer.pins", lambda device: True)
    monkeypatch.setattr("obfuscatune.worker.shelf.pins", lambda device: True)
    monkeypatch.setattr("obfuscatune.worker.server.pins", lambda device: True)
    monkeypatch.setattr(torch, "empty", noting)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found)
    return found


@contextlib.contextmanager
def served(tap: bool) -> Iterator[Session]:
    """A session with a worker in a thread; one whose connection is recorded shares no memory."""
    ours, theirs = socket.socketpair()
    connection = Connection(theirs, peer="enclave", tap=(lambda way, run: None) if tap else None)
    thread = threading.Thread(target=serve_connection, args=(connection, CPU))
    thread.start()
    session = Session(Connection(ours, peer="w"), worker="w", timeout=20)
    try:
        yield session
    finally:
        session.close()
        thread.join()


@pytest.mark.parametrize("op", ["forward", "multiply"])
@pytest.mark.parametrize("tap", [True, False], ids=["socket", "shared"])
def test_both_ways_go_through_page_locked_memory(op: str, tap: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    to = torch.Tensor.to

    def noted(tensor: torch.Tensor, device: Any, **how: Any) -> torch.Tensor:
        seen.append(tensor)
        assert how == {"non_blocking": True}
        return to(tensor, device, **how)

    with served(tap) as session, monkeypatch.context() as patched:
        session.hello()
        weight, x = torch.randn(128, 128), torch.randn(1, 200, 128)
        session.request("define", "h.0", {"segment": "s", "kind": "linear", "spec": {}}, {"weight": weight}, {})
        patched.setattr(torch.Tensor, "to", noted)
        waits = gpu.waits
        header = {"segment": "s", "transpose": False, "keep": True}
        y = session.request(op, "h.0", header, {"x": x}, {"y": ((1, 200, 128), torch.float32)})[1]["y"]
    torch.testing.assert_close(y, x @ weight)
    assert gpu.waits == waits + 1
    (sent,) = seen
    # A product reads its rows where the enclave put them; a call that is kept has its own.
    assert (sent.data_ptr() in gpu.pinned) == (tap or op == "forward")


def test_on_a_cpu_nothing_is_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: Any = None) -> SimpleNamespace:
        raise AssertionError("waits for a GPU")

    monkeypatch.setattr(torch.cuda, "current_stream", refuse)
    with served(tap=True) as session:
        session.hello()
        header = {"segment": "s", "kind": "linear", "spec": {}}
        session.request("define", "h.0", header, {"weight": torch.randn(8, 8)}, {})


def test_bits_of_a_mask_on_a_device_are_unpacked_there() -> None:
    mask = torch.rand(2, 1, 5, 7) > 0.5
    bits = pack_mask(mask)
    assert unpack_mask(bits, [2, 1, 5, 7]).equal(mask)
    with_bytes = SimpleNamespace(**{name: getattr(bits, name) for name in ("dtype", "ndim", "numel", "unsqueeze")})
    with_bytes.is_cpu, with_bytes.device = False, CPU
    assert unpack_mask(with_bytes, [2, 1, 5, 7]).equal(mask)  # type: ignore[arg-type]


@pytest.mark.parametrize("profile", ["balanced", "stream"])
def test_a_mask_crosses_and_is_unpacked_once_for_all_layers_of_a_pass(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked: list[torch.Tensor] = []
    used: list[torch.Tensor] = []

    def unpack(bits: torch.Tensor, shape: Any) -> torch.Tensor:
        unpacked.append(unpack_mask(bits, shape))
        return unpacked[-1]

    from obfuscatune.worker import attention

    attend = attention.attend

    def attending(*args: Any, **options: Any) -> torch.Tensor:
        used.append(options["mask"])
        return attend(*args, **options)

    monkeypatch.setattr("obfuscatune.worker.session.unpack_mask", unpack)
    monkeypatch.setattr("obfuscatune.worker.attention.attend", attending)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    labels = IDS.masked_fill(torch.arange(IDS.shape[1]) < 3, -100)  # the third is predicted from padding
    with (
        worker_in_a_thread(tmp_path) as address,
        obfuscatune.protect(new_model(), profile=profile, worker=address) as made,
    ):
        made.model(IDS, attention_mask=mask, labels=labels).loss.backward()
    assert len(unpacked) == 1
    assert len(used) == 2 and all(each is unpacked[0] for each in used)  # of two blocks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("profile", ["balanced", "strict", "shared"])
def test_a_worker_on_a_gpu_computes_the_same(profile: str) -> None:
    plain = new_model()
    loss_of(plain).backward()
    with obfuscatune.protect(new_model(), profile=profile, worker="spawn", device="cuda") as protected:
        loss = loss_of(protected.model)
        loss.backward()
        torch.testing.assert_close(loss.detach(), loss_of(plain).detach(), atol=1e-4, rtol=1e-4)
        grads = dict(protected.model.named_parameters())
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(grads[name].grad, parameter.grad, atol=1e-3, rtol=1e-3)
