"""A worker that records all it is sent and all it computes."""

import contextlib
import copy
import socket
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import obfuscatune
from obfuscatune.enclave.keys import Key
from obfuscatune.protocol.address import Address, listen
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.expand import tensors_drawn
from obfuscatune.protocol.frames import PREFIX, decode_frame, decode_prefix
from obfuscatune.protocol.limits import Limits
from obfuscatune.worker.server import serve_connection
from obfuscatune.worker.session import WorkerSession

from .models import SEED, new_model
from .truth import ALL, tell_activations, tell_weights

TEXT = b"the merger closes on friday at noon."  # 36 tokens, one a byte
PROMPT = b"the secret price"  # 16 tokens
NEW_TOKENS = 3


_OF_THREAD: dict[int, "Recording"] = {}  # by the thread that serves the session


@dataclass
class Recording:
    """All that the worker got to know in a session, and the enclave's truth beside it.

    ``of_block``: the part of the truth that is of the worker's own block, where each of several workers has one.
    """

    raw: dict[str, bytearray] = field(default_factory=lambda: {"to worker": bytearray(), "to enclave": bytearray()})
    computed: list[Tensor] = field(default_factory=list)
    truth: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    of_block: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    keys: list[Key] = field(default_factory=list)
    secret: bytes = b""
    generated: list[int] = field(default_factory=list)

    def frames(self, direction: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Each frame of a direction, decoded again from its bytes."""
        raw = memoryview(self.raw[direction])
        while raw:
            end = PREFIX.size + sum(decode_prefix(bytes(raw[: PREFIX.size])))
            fields, tensors = decode_frame(raw[:end])
            made = tensors_drawn(fields["drawn"], Limits().max_payload_bytes) if "drawn" in fields else {}
            yield fields, {**{name: _tensor(*entry) for name, entry in tensors.items()}, **made}
            raw = raw[end:]

    def seen(self) -> list[Tensor]:
        """Every tensor that crossed, and every one that the worker computed from them.

        What is of layers side by side is seen in one and in parts: definitions say how wide each of them is.
        """
        widths: dict[str, list[int]] = {}
        segments: dict[int, str] = {}
        crossed: list[Tensor] = []
        for direction in ("to worker", "to enclave"):
            for fields, tensors in self.frames(direction):
                name = fields.get("segment", segments.get(fields.get("id", -1), ""))
                if direction == "to worker":
                    segments[fields["id"]] = name
                if fields.get("op") == "define":
                    widths[name] = _widths(fields["spec"])
                crossed += [piece for t in tensors.values() for piece in _pieces(t, widths.get(name, []))]
        return crossed + self.computed


def _widths(spec: dict[str, Any]) -> list[int]:
    """Widths of what a first product computes; the halves of a gated MLP that is one layer."""
    widths: list[int] = spec.get("widths", [])
    return [widths[0] // 2] * 2 if spec.get("gated") and len(widths) == 1 else widths


def _pieces(tensor: Tensor, widths: list[int]) -> list[Tensor]:
    if len(widths) < 2 or not tensor.ndim or tensor.shape[-1] != sum(widths):
        return [tensor]
    return [tensor, *torch.split(tensor, widths, dim=-1)]


def _tensor(spec: Any, elements: memoryview) -> Tensor:
    if not elements:
        return torch.empty(spec.shape, dtype=spec.dtype)
    return torch.frombuffer(bytearray(elements), dtype=spec.dtype).view(spec.shape)


class _Keep(TorchDispatchMode):
    """Keeps a copy of what every torch operation of its thread returns, backward included.

    Views show nothing new, but for those that cut rows in parts: the gate of an MLP, or q of q, k and v.
    """

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        cuts = "split" in func.__name__
        if "empty" not in func.__name__ and (
            cuts or not func.is_view
        ):  # what lies in fresh memory is of this process, not sent
            self._kept += [t.clone() for t in tree_leaves(result) if isinstance(t, Tensor) and t.ndim]
        return result


@contextlib.contextmanager
def recording_worker(path: Path, recording: Recording) -> Iterator[str]:
    """Serve one enclave from a thread, and yield the address."""
    address = Address(path=str(path))
    listener = listen(address)
    names = {"in": "to worker", "out": "to enclave"}

    def serve() -> None:
        accepted: socket.socket = listener.accept()[0]
        _OF_THREAD[threading.get_ident()] = recording
        tap = lambda direction, run: recording.raw[names[direction]].extend(run)  # noqa: E731
        # In its single steps, so that logits and the attention map are among what is kept.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            serve_connection(Connection(accepted, peer="enclave", tap=tap), torch.device("cpu"))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield str(address)
    finally:
        listener.close()
        thread.join(timeout=60)
        assert not thread.is_alive()


def record(profile: str, switches: dict[str, Any], directory: Path, family: str = "gpt2") -> Recording:
    """Do a training step and a greedy generation under a profile, and the same untouched, with all of it recorded."""
    return record_links(profile, switches, directory, family, links=1)[0]


def record_links(
    profile: str, switches: dict[str, Any], directory: Path, family: str = "gpt2", *, links: int
) -> list[Recording]:
    """Do so with several workers: the whole truth is in the first recording, that of a link's block in its own."""
    recordings = [Recording() for _ in range(links)]
    model = new_model(family)
    model.config.name_or_path = "acme/private-model"
    twin = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        made = Key.__init__

        def note(self: Key, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            recordings[0].keys.append(self)

        handle = WorkerSession.handle

        def watched(self: WorkerSession, header: Any, tensors: Any) -> Any:
            with _Keep(_OF_THREAD[threading.get_ident()].computed):
                return handle(self, header, tensors)

        patch.setattr(Key, "__init__", note)
        patch.setattr(WorkerSession, "handle", watched)
        workers = [
            stack.enter_context(recording_worker(directory / f"worker{i}", recording))
            for i, recording in enumerate(recordings)
        ]
        with obfuscatune.protect(
            model, profile=profile, worker=workers, insecure_test_seed=SEED, timeout=60, **switches
        ) as protected:
            recordings[0].secret = bytes(protected.secret._value)
            _work(protected.model, protected.create_optimizer("sgd", lr=0.1))
    tellings = [(recordings[0].truth, ALL)]
    if links > 1:
        tellings += [(recording.of_block, slice(i, i + 1)) for i, recording in enumerate(recordings)]
    for truth, blocks in tellings:
        tell_weights(truth, twin, blocks)
        tell_activations(truth, twin, blocks)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    recordings[0].generated = _work(twin, optimizer)
    for truth, blocks in tellings:
        tell_weights(truth, twin, blocks)
    return recordings


def _work(model: Any, optimizer: torch.optim.Optimizer) -> list[int]:
    ids = torch.tensor([list(TEXT)])
    for _ in range(2):  # twice, so that factors pushed after a step are in the recording
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        ids = model.generate(
            input_ids=torch.tensor([list(PROMPT)]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        )  # fmt: skip
    return ids[0].tolist()
