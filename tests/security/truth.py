"""The plain tensors that a worker must not learn, by what they are and whatever the family calls them.

Of an attention *in* are the layers that compute q, k and v, one or three, and *out* is the layer after the heads; of an
MLP *in* is ``up``, or ``gate | up``, and *out* the layer after the activation. ``without bias``: as the layer's product
is before it, for that is what leaves where the enclave adds the bias. Layers without a bias have that alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.activations import ACT2FN

from obfuscatune.enclave.families import Decoder, Layer, Mlp, Norm, Part, read_decoder
from obfuscatune.enclave.folding import fold_norm
from obfuscatune.protocol.norms import rms_rows

Truth = dict[str, list[Tensor]]
IN = {"attention": "q, k, v", "MLP": "MLP pre-activations"}
BEFORE_OUT = {"attention": "heads' output", "MLP": "MLP activations"}
ALL = slice(None)


def _parts(decoder: Decoder, blocks: slice = ALL) -> list[tuple[str, Part]]:
    return [
        (name, part)
        for block in decoder.blocks[blocks]
        for name, part in (("attention", block.attention), ("MLP", block.mlp))
        if part is not None
    ]


def tell_weights(truth: Truth, twin: Any, blocks: slice = ALL) -> None:
    """Add all weights, biases and LoRA factors, as they are stored, joined, and with norms folded in.

    blocks: of these alone, and nothing that is of no block.
    """
    decoder = read_decoder(twin.get_base_model())
    known = set()
    for name, part in _parts(decoder, blocks):
        for place, layers in (("in", part.first), ("out", (part.last,))):
            for layer in layers:
                truth[f"{name} {place} weight"].append(layer.weight.clone())
                if layer.bias is not None:
                    truth[f"{name} {place} bias"].append(layer.bias.clone())
                for factor, turned in (("lora_A", False), ("lora_B", True)):
                    weight = getattr(layer.lora, factor)["default"].weight.detach()
                    truth[f"{name} {place} {factor}"].append(_by_side(weight, turned=turned).clone())
                known |= {id(parameter) for parameter in layer.lora.parameters()}
        weight, bias = part.first_weight(), part.first_bias()
        truth[f"{name} in weight"].append(weight.clone())
        folded, folded_bias = fold_norm(weight, bias, part.norm.gain, part.norm.shift)
        truth[f"{name} in weight, norm folded"].append(folded)
        for tensor, what in ((bias, "bias"), (folded_bias, "bias, norm folded")):
            if tensor is not None and (what == "bias" or part.norm.shift is not None):
                truth[f"{name} in {what}"] += [tensor.clone(), *_halves(part, part.first, tensor)]
    for name, parameter in twin.named_parameters():  # norms, embeddings, head
        if id(parameter) not in known and blocks == ALL:
            truth[name.removeprefix("base_model.model.")].append(parameter.detach().clone())


def _by_side(factor: Tensor, *, turned: bool) -> Tensor:
    """LoRA's B by its long side, as the worker has it: ``[r, out]``."""
    return factor.T if turned else factor


def _halves(part: Part, layers: tuple[Layer, ...], rows: Tensor) -> list[Tensor]:
    """Gate and up of a gated MLP's joint rows ``[..., 2 h]``."""
    joint = isinstance(part, Mlp) and part.gated and layers == part.first and rows.shape[-1] == 2 * part.last.shape[0]
    return list(rows.chunk(2, dim=-1)) if joint else []


class _Teller:
    """Hooks on a twin that add what its layers compute, and the gradients of that."""

    def __init__(self, truth: Truth) -> None:
        self._truth = truth

    def tell(self, name: str, value: Tensor) -> None:
        self._truth[name].append(value.detach().clone())
        if value.requires_grad:
            value.register_hook(lambda gradient: self._truth[f"gradient of {name}"].append(gradient.clone()))

    def watch(self, module: nn.Module, into: str | None, out: str | None) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            if into is not None:
                self.tell(into, args[0])
            if out is not None:
                self.tell(out, output)

        module.register_forward_hook(hook)

    def watch_norm(self, norm: Norm, name: str) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            rows = args[0]
            layer = norm.kind == "layernorm"
            plain = F.layer_norm(rows, rows.shape[-1:], eps=norm.eps) if layer else rms_rows(rows, norm.eps)
            self.tell(f"input of the norm before {name}", rows)
            self.tell(f"output of the norm before {name}", output)
            self.tell(f"normalized rows before {name}", plain)

        norm.module.register_forward_hook(hook)

    def watch_layers(self, part: Part, layers: tuple[Layer, ...], name: str) -> None:
        """What layers side by side give and its gradients: one by one as stored, and joined in canonical order."""
        outputs: dict[int, Tensor] = {}
        gradients: dict[int, Tensor] = {}

        def join(found: dict[int, Tensor], add: Callable[[Tensor, Tensor | None], None], bias: Tensor | None) -> None:
            if len(found) == len(layers):
                add(torch.cat([found[i] for i in sorted(found)], dim=-1), bias)
                found.clear()

        def add_gradient(gradient: Tensor, _: Tensor | None = None) -> None:
            self._truth[f"gradient of {name}"] += [gradient.clone(), *_halves(part, layers, gradient)]

        def add(rows: Tensor, bias: Tensor | None) -> None:
            rows, without = rows.detach(), rows.detach() if bias is None else rows.detach() - bias
            self._truth[f"{name}, without bias"] += [without.clone(), *_halves(part, layers, without)]
            if bias is not None:
                self._truth[name] += [rows.clone(), *_halves(part, layers, rows)]

        def hook(i: int, layer: Layer) -> Callable[..., None]:
            def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                add(output, layer.bias)
                outputs[i] = layer.canonical(output)
                join(outputs, add, part.first_bias() if layers == part.first else layer.bias)
                if output.requires_grad:
                    output.register_hook(keep_gradient)

            def keep_gradient(gradient: Tensor) -> None:
                add_gradient(gradient)
                gradients[i] = layer.canonical(gradient)
                join(gradients, add_gradient, None)

            return keep

        for i, layer in enumerate(layers):
            layer.lora.register_forward_hook(hook(i, layer))

    def watch_gate(self, mlp: Mlp) -> None:
        """The activated gate of a gated MLP, which the worker computes besides."""
        if mlp.gated:
            act, gate = ACT2FN[mlp.activation], mlp.first[0]

            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                rows = output if len(mlp.first) > 1 else output.chunk(2, dim=-1)[0]
                self.tell("activated gate", act(rows.detach()))

            gate.lora.register_forward_hook(hook)

    def watch_attention(self, module: nn.Module) -> None:
        """Attention weights, and gradients of what softmax makes them of; the twin computes them in single steps."""

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            weights: Tensor = output[1]
            self._truth["attention map"].append(weights.detach().clone())

            def keep(gradient: Tensor) -> None:
                p = weights.detach()
                before = p * (gradient - (p * gradient).sum(dim=-1, keepdim=True))
                self._truth["gradient of attention logits"].append(before)

            if weights.requires_grad:
                weights.register_hook(keep)

        module.register_forward_hook(hook)

    def watch_parameter(self, name: str, parameter: Tensor, *, turned: bool) -> None:
        def note(gradient: Tensor) -> None:
            self._truth[f"gradient of {name}"].append(_by_side(gradient, turned=turned).clone())

        parameter.register_hook(note)


def tell_activations(truth: Truth, twin: Any, blocks: slice = ALL) -> None:
    """Have all activations and gradients of what the twin does next added; with ``blocks``, those of these blocks."""
    model = twin.get_base_model()
    model.set_attn_implementation("eager")
    decoder, teller = read_decoder(model), _Teller(truth)
    if blocks == ALL:
        teller.watch(model.get_input_embeddings(), None, "token embeddings")
        teller.watch(model.get_output_embeddings(), None, "logits")
        if decoder.final_norm is not None:
            teller.watch(model.get_submodule(decoder.final_norm), "final hidden states", "output of the last norm")
        rotary = getattr(model.base_model, "rotary_emb", None)
        if rotary is not None:
            rotary.register_forward_hook(lambda _, args, out: truth["rotary tables"].extend(t.clone() for t in out))
    for name, part in _parts(decoder, blocks):
        teller.watch_norm(part.norm, name)
        if part.norm_after is not None:
            teller.watch(part.block.get_submodule(part.norm_after), None, f"{name} output, normalized")
        teller.watch_layers(part, part.first, IN[name])
        teller.watch_layers(part, (part.last,), f"{name} output")
        teller.watch(part.last.lora, BEFORE_OUT[name], None)
        if isinstance(part, Mlp):
            teller.watch_gate(part)
        else:
            teller.watch_attention(part.module)
        for place, layers in (("in", part.first), ("out", (part.last,))):
            for layer in layers:
                teller.watch(layer.lora.lora_A["default"], None, "x A")
                for factor, turned in (("lora_A", False), ("lora_B", True)):
                    weight = getattr(layer.lora, factor)["default"].weight
                    teller.watch_parameter(f"{name} {place} {factor}", weight, turned=turned)
