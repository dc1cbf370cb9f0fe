"""A worker that records all it is sent and all it computes, and the plain tensors that it must not learn."""

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
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

import obfuscatune
from obfuscatune.enclave.keys import Key
from obfuscatune.protocol.address import Address, listen
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.frames import PREFIX, decode_frame, decode_prefix
from obfuscatune.worker.server import serve_connection
from obfuscatune.worker.session import WorkerSession

TEXT = b"the merger closes on friday at noon."  # 36 tokens, one a byte
PROMPT = b"the secret price"  # 16 tokens
NEW_TOKENS = 3
SEED = 20


@dataclass
class Recording:
    """All that the worker got to know in a session, and the enclave's truth beside it."""

    raw: dict[str, bytearray] = field(default_factory=lambda: {"to worker": bytearray(), "to enclave": bytearray()})
    computed: list[Tensor] = field(default_factory=list)
    truth: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    keys: list[Key] = field(default_factory=list)
    secret: bytes = b""
    generated: list[int] = field(default_factory=list)

    def frames(self, direction: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Each frame of a direction, decoded again from its bytes."""
        raw = memoryview(self.raw[direction])
        while raw:
            end = PREFIX.size + sum(decode_prefix(bytes(raw[: PREFIX.size])))
            fields, tensors = decode_frame(raw[:end])
            yield fields, {name: _tensor(*entry) for name, entry in tensors.items()}
            raw = raw[end:]

    def seen(self) -> list[Tensor]:
        """Every tensor that crossed, and every one that the worker computed from them."""
        crossed = [t for direction in self.raw for _, tensors in self.frames(direction) for t in tensors.values()]
        return crossed + self.computed


def _tensor(spec: Any, elements: memoryview) -> Tensor:
    if not elements:
        return torch.empty(spec.shape, dtype=spec.dtype)
    return torch.frombuffer(bytearray(elements), dtype=spec.dtype).view(spec.shape)


class _Keep(TorchDispatchMode):
    """Keeps a copy of what every torch operation of its thread returns, backward included; views show nothing new."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" not in func.__name__ and not func.is_view:  # what lies in fresh memory is of this process, not sent
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


def new_model() -> Any:
    """A small GPT-2 with LoRA, every parameter of it random and telling, norms and biases too."""
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=128, n_positions=40, n_embd=32, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # far from 0, so that nothing with a bias looks like the same without it
            signs = torch.randint(2, parameter.shape) * 2 - 1
            nn.init.uniform_(parameter, 0.3, 0.9).data.mul_(signs)
        else:
            nn.init.normal_(parameter, std=0.1)  # small, so that no neuron is in the range where GELU is the identity
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"], init_lora_weights=False, fan_in_fan_out=True
    )
    return get_peft_model(model, lora).eval()


def record(profile: str, switches: dict[str, Any], directory: Path) -> Recording:
    """Do a training step and a greedy generation under a profile, and the same untouched, with all of it recorded."""
    recording = Recording()
    model = new_model()
    model.config.name_or_path = "acme/private-model"
    twin = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch, recording_worker(directory / "worker", recording) as address:
        made = Key.__init__

        def note(self: Key, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            recording.keys.append(self)

        handle = WorkerSession.handle

        def watched(self: WorkerSession, header: Any, tensors: Any) -> Any:
            with _Keep(recording.computed):
                return handle(self, header, tensors)

        patch.setattr(Key, "__init__", note)
        patch.setattr(WorkerSession, "handle", watched)
        with obfuscatune.protect(
            model, profile=profile, worker=address, insecure_test_seed=SEED, timeout=60, **switches
        ) as protected:
            recording.secret = bytes(protected.secret._value)
            _work(protected.model, protected.create_optimizer("sgd", lr=0.1))
    _tell_weights(recording.truth, twin)
    _tell_activations(recording.truth, twin)
    recording.generated = _work(twin, torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1))
    _tell_weights(recording.truth, twin)
    return recording


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


def _tell_weights(truth: dict[str, list[Tensor]], twin: Any) -> None:
    base = twin.get_base_model()
    for name, parameter in twin.named_parameters():
        truth[_kind(name)].append(_by_side(name, parameter.detach()).clone())
    for block in base.transformer.h:
        for norm, linear in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
            name = "c_attn" if linear is block.attn.c_attn else "c_fc"
            weight, bias = linear.base_layer.weight.detach(), linear.base_layer.bias.detach()
            truth[f"{name} weight, norm folded"].append(norm.weight.detach()[:, None] * weight)
            truth[f"{name} bias, norm folded"].append(bias + norm.bias.detach() @ weight)


def _by_side(name: str, tensor: Tensor) -> Tensor:
    """LoRA's B by its long side, as the worker has it: ``[r, out]``."""
    return tensor.T if "lora_B" in name else tensor


def _kind(name: str) -> str:
    """The parameter's role, without the number of its block: ``attn.c_proj lora_A``."""
    parts = [
        p for p in name.split(".") if p not in ("base_model", "model", "transformer", "h", "base_layer", "default")
    ]
    return " ".join(p for p in parts if not p.isdigit())


def _tell_activations(truth: dict[str, list[Tensor]], twin: Any) -> None:
    def tell(name: str, value: Tensor) -> None:
        truth[name].append(value.detach().clone())
        if value.requires_grad:
            value.register_hook(lambda gradient: truth[f"gradient of {name}"].append(gradient.clone()))

    def watch(module: nn.Module, into: str | None, out: str | None) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            if into is not None:
                tell(into, args[0])
            if out is not None:
                tell(out, output)

        module.register_forward_hook(hook)

    def watch_norm(norm: nn.LayerNorm, name: str) -> None:
        hook = lambda _, args, out: tell(f"{name} normalized rows", F.layer_norm(args[0], norm.normalized_shape))  # noqa: E731
        norm.register_forward_hook(hook)

    def watch_linear(layer: Any, out: str) -> None:
        bias = layer.base_layer.bias.detach()
        layer.register_forward_hook(lambda _, args, output: tell(f"{out}, without bias", output - bias))

    def watch_gradient(name: str, parameter: Tensor) -> None:
        note = lambda gradient: truth[f"gradient of {_kind(name)}"].append(_by_side(name, gradient).clone())  # noqa: E731
        parameter.register_hook(note)

    def watch_qkv(layer: Any) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.shape[1] == len(TEXT):
                q, k = (t.view(len(TEXT), 4, 8).transpose(0, 1) for t in output[0].detach().split(32, dim=-1)[:2])
                logits = q @ k.mT / 8**0.5
                allowed = torch.ones_like(logits).tril().bool()
                tell("attention map", logits.masked_fill(~allowed, -torch.inf).softmax(-1))

        layer.register_forward_hook(hook)

    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            watch_gradient(name, parameter)
    base = twin.get_base_model()
    watch(base.transformer.wte, None, "token embeddings")
    for block in base.transformer.h:
        watch(block.ln_1, "block input", "ln_1 output")
        watch(block.ln_2, "residual between", "ln_2 output")
        watch_norm(block.ln_1, "ln_1")
        watch_norm(block.ln_2, "ln_2")
        watch_qkv(block.attn.c_attn)
        watch(block.attn.c_attn, None, "q, k, v")
        watch_linear(block.attn.c_attn, "q, k, v")
        watch(block.attn.c_proj, "heads' output", "attention output")
        watch_linear(block.attn.c_proj, "attention output")
        watch(block.mlp.c_fc, None, "MLP pre-activations")
        watch_linear(block.mlp.c_fc, "MLP pre-activations")
        watch(block.mlp.c_proj, "MLP activations", "MLP output")
        watch_linear(block.mlp.c_proj, "MLP output")
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            watch(layer.lora_A["default"], None, "x A")
    watch(base.transformer.ln_f, "final hidden states", "ln_f output")
    watch(base.lm_head, None, "logits")
