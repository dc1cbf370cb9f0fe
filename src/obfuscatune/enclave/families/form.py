r"""The normal form of a decoder: what every algorithm of the enclave sees of a model, whatever its family.

    block = attention and MLP, one after the other or both on the same input (`parallel`)
    part  = [norm] -> first layers, which share one input -> (softmax | activation) -> last layer -> [norm after]

A *layer* is a linear layer as it is stored, with PEFT's LoRA around it or not. Canonical columns of the first layers
taken together are ``q | k | v`` of an attention and ``up``, or ``gate | up``, of an MLP: a fused weight is one layer
that covers several of these, a split one is several layers. Weights are ``[in, out]`` and rows are tokens.

Nothing here knows a key or a profile. Secrecy: layers and norms hold the plain weights.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from obfuscatune.errors import ONLY_INSIDE, UnsupportedModelError

NormKind = Literal["layernorm", "rmsnorm", "rmsnorm1p"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What an attention computes between its layers.

    Attributes:
        heads, kv_heads: query heads, and heads of k and v; each of these serves ``heads / kv_heads`` query heads.
        head_dim: width of one head. scale: factor on q k^T.
        rotary: how many of a head's first numbers are rotated by position, as halves ``(i, i + rotary / 2)``; 0 none.
        softcap: c of ``c tanh(logits / c)``, or None.
        head_norms: whether q and k are normalized in each head; no key of q and k commutes with that.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotary: int = 0
    softcap: float | None = None
    head_norms: bool = False

    @property
    def query_width(self) -> int:
        """Columns of q."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of k, and of v."""
        return self.kv_heads * self.head_dim


@dataclass(slots=True, repr=False)  # a repr would show weights
class Norm:
    """The norm before a part: its module, and where it is. ``x^ gain + shift`` with ``x^`` of unit size."""

    kind: NormKind
    parent: nn.Module
    name: str
    path: str
    module: Any

    @property
    def eps(self) -> float:
        """What is added to the mean square."""
        return float(self.module.eps if hasattr(self.module, "eps") else self.module.variance_epsilon)

    @property
    def gain(self) -> Tensor:
        """``[d]``; of Gemma's norms in float32 at least, as stock code adds: a bfloat16 has few bits near 1."""
        weight: Tensor = self.module.weight.detach()
        return 1 + _at_least_float32(weight) if self.kind == "rmsnorm1p" else weight

    @property
    def shift(self) -> Tensor | None:
        """``[d]``, or None."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(slots=True, repr=False)  # a repr would show weights
class Layer:
    """One stored linear layer: where it is, its module, and PEFT's layer around that.

    Attributes:
        columns: canonical column j is stored column ``columns[j]``; None where the order is the same.
    """

    parent: nn.Module
    name: str
    path: str
    base: Any
    lora: Any
    columns: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """``[in, out]`` in stored order, without a copy."""
        weight: Tensor = self.base.weight.detach()
        return weight if type(self.base) is Conv1D else weight.T

    @property
    def bias(self) -> Tensor | None:
        """``[out]`` in stored order, or None."""
        return None if self.base.bias is None else self.base.bias.detach()

    @property
    def shape(self) -> tuple[int, int]:
        """``(in, out)``."""
        weight = self.weight
        return weight.shape[0], weight.shape[1]

    def canonical(self, stored: Tensor) -> Tensor:
        """Return ``[..., out]`` with its columns in canonical order."""
        return stored if self.columns is None else stored.index_select(-1, self.columns)

    def in_stored_order(self) -> "Layer":
        """The same layer for whoever computes it alone, in the order in which the model has its columns."""
        return replace(self, columns=None)

    def stored(self, canonical: Tensor) -> Tensor:
        """Undo :meth:`canonical`."""
        return canonical if self.columns is None else canonical.index_select(-1, self.columns.argsort())


def find_module(parent: nn.Module, name: str, where: str) -> nn.Module:
    """Return the module ``name`` of ``parent``, whose path is ``where``.

    Raises:
        UnsupportedModelError: the caller, or PEFT, has put something in ``parent``'s place that has no such module.
    """
    try:
        return parent.get_submodule(name)
    except AttributeError:  # torch says so of what is None too
        raise UnsupportedModelError(
            "a module of the model's blocks was replaced by one of another kind",
            got=f"{type(parent).__name__} without {name}",
            expected="the modules that the family has",
            where=where,
            hint=ONLY_INSIDE,
        ) from None


def find_layer(parent: nn.Module, name: str, where: str, columns: Tensor | None = None) -> Layer:
    """Return the layer ``name`` of ``parent``, whose path is ``where``.

    Raises:
        UnsupportedModelError: a layer, or an adapter around one, of a kind that cannot be run exactly.
    """
    path = f"{where}.{name}"
    module: Any = find_module(parent, name, where)
    lora = module if isinstance(module, LoraLinear) else None
    base = module if lora is None else lora.get_base_layer()
    if type(base) not in (nn.Linear, Conv1D):
        got = f"{type(base).__module__}.{type(base).__name__}"
        raise UnsupportedModelError(
            "layer of a kind that cannot be keyed",
            got=got,
            expected="torch.nn.Linear, not quantized",
            where=path,
            hint=ONLY_INSIDE,
        )
    if lora is not None:
        _check_adapter(lora, path)
    owner, _, last = name.rpartition(".")
    return Layer(parent.get_submodule(owner) if owner else parent, last, path, base, lora, columns)


def _check_adapter(lora: Any, path: str) -> None:
    if type(lora) is not LoraLinear:
        raise _not_plain(type(lora).__name__, path)
    refuse_variants(lora, path, lora.lora_A)
    if lora.merged:
        raise UnsupportedModelError("a merged adapter", where=path, hint="model.unmerge_adapter() first")


def refuse_variants(lora: Any, path: str, adapters: Iterable[str]) -> None:
    """Refuse adapters of PEFT's layer that are not plain LoRA. Raises UnsupportedModelError with their kind."""
    for name in adapters:
        if (variant := lora.lora_variant.get(name)) is not None:
            raise _not_plain(type(variant).__name__, path)
        if lora.lora_bias.get(name):
            raise _not_plain("lora_bias", path)


def _not_plain(got: str, path: str) -> UnsupportedModelError:
    expected = "plain LoRA (no DoRA, no lora_bias, no other variant)"
    return UnsupportedModelError("kind of adapter", got=got, expected=expected, where=path, hint=ONLY_INSIDE)


@dataclass(slots=True, repr=False)
class Part:
    """An attention or an MLP.

    Attributes:
        name: its name in the block, ``path`` in the model. norm: before it. norm_after: path of one on its output.
        first: layers that share its input, in canonical order. last: the layer that writes its output.
        covers: for each first layer, the canonical pieces that it computes (of ``qkv``, ``u`` or ``gu``).
        dropout: on the output, within the part; None where there is none.
    """

    name: str
    path: str
    block: nn.Module
    module: nn.Module
    norm: Norm
    first: tuple[Layer, ...]
    covers: tuple[str, ...]
    last: Layer
    dropout: nn.Module | None = None
    norm_after: str | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All its layers, in the order in which they compute."""
        return (*self.first, self.last)

    @property
    def width(self) -> int:
        """D, of what enters."""
        return self.first[0].shape[0]

    def first_weight(self) -> Tensor:
        """``[d, n]``, canonical, in the model's dtype; a copy where it is not one stored weight."""
        parts = [layer.canonical(layer.weight) for layer in self.first]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def first_bias(self) -> Tensor | None:
        """``[n]``, canonical; None where no layer has one."""
        if all(layer.bias is None for layer in self.first):
            return None
        parts = [
            layer.weight.new_zeros(layer.shape[1]) if layer.bias is None else layer.canonical(layer.bias)
            for layer in self.first
        ]
        return torch.cat(parts)


@dataclass(slots=True, repr=False)
class Attention(Part):
    """An attention; ``dropout_field``: name of the configuration's dropout on its weights; ``index``: of the layer."""

    shape: AttentionShape = field(kw_only=True)
    dropout_field: str = field(kw_only=True, default="attention_dropout")
    index: int = field(kw_only=True)

    @property
    def dropout_of_weights(self) -> float:
        """The probability on attention weights, as it is on the module: a number, or a dropout's."""
        found = [getattr(self.module, name, None) for name in ("attn_dropout", "attention_dropout")]
        return float(max((getattr(value, "p", value) or 0.0 for value in found), default=0.0))


@dataclass(slots=True, repr=False)
class Mlp(Part):
    """An MLP: ``act(x up) down``, or, where it is gated, ``(act(x gate) * (x up)) down``."""

    gated: bool = field(kw_only=True)
    activation: str = field(kw_only=True)


@dataclass(frozen=True, slots=True, repr=False)
class Group:
    """Linear layers that share one input, and travel in one call where linear layers alone leave.

    Attributes:
        norm: before them, which may be folded. reads, writes: name of the stream that enters, and that leaves.
        inner_in, inner_out: whether these are within an attention or MLP rather than of the residual stream's width.
    """

    layers: tuple[Layer, ...]
    norm: Norm | None
    reads: str
    writes: str
    inner_in: bool
    inner_out: bool


@dataclass(slots=True, repr=False)
class Block:
    """One decoder block. ``attention`` and ``mlp`` are None in a model without a family's record."""

    index: int
    path: str
    module: nn.Module
    groups: tuple[Group, ...]
    attention: Attention | None = None
    mlp: Mlp | None = None
    parallel: bool = False
    dropouts: tuple[nn.Module, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Attention and MLP, where they are known."""
        return tuple(part for part in (self.attention, self.mlp) if part is not None)

    @property
    def layers(self) -> Iterator[Layer]:
        """All linear layers, in order."""
        return (layer for group in self.groups for layer in group.layers)


@dataclass(slots=True, repr=False)
class Decoder:
    """A causal language model in normal form.

    Attributes:
        model: of ``transformers``, with its head. family: ``config.model_type``; ``known``: whether there is a record.
        blocks_path: of the list of blocks. final_norm: path of the norm after the last one; None where not known.
        norm: kind of all norms before parts; None where not known.
    """

    model: Any
    family: str
    known: bool
    blocks_path: str
    blocks: list[Block]
    final_norm: str | None = None
    norm: NormKind | None = None

    @property
    def width(self) -> int:
        """D, of the residual stream."""
        return int(self.model.get_input_embeddings().embedding_dim)
