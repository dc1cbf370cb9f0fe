"""What a family's record says, and how a model is read by it into the normal form (`form.py`).

A family is chosen by ``config.model_type``, never by a model's name, and what a record does not cover is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.enclave.families.form import (
    Attention,
    AttentionShape,
    Block,
    Decoder,
    Group,
    Layer,
    Mlp,
    Norm,
    NormKind,
    find_layer,
    find_module,
)
from obfuscatune.errors import ONLY_INSIDE, OWN_CONFIG, UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySpec:
    """Where each role of the family's blocks lives, relative to the causal language model, its block, or its part.

    Attributes:
        model_type: the value of ``config.model_type``.
        blocks, final_norm: paths of the list of decoder blocks, and of the norm after the last one.
        norm: kind of all norms.
        attention, mlp: paths of the parts; attention_norm, mlp_norm: of the norms before them; attention_norm_after,
            mlp_norm_after: of those on their output, if any.
        first, out: the layers that compute ``q | k | v``, one fused or three; the output layer.
        up, down: the layers that compute ``up`` or ``gate | up``; the output layer.
        gated: whether there is a gate.
        dropout, mlp_dropout: paths of the dropout on a part's output, in the part.
        block_dropouts: those in the block, on its parts' outputs.
        attention_dropout: name of the configuration's field with the dropout on attention weights.
        attention_shape: ``(config, layer) -> AttentionShape``.
        activation: ``config -> `` name of the MLP's activation function as ``transformers`` calls it.
        columns: ``config -> `` order of the columns of a fused q,k,v that is not stored as ``q | k | v``.
        parallel: ``config -> `` whether both parts of a block read the same residual stream.
        refusals: ``config -> `` what of this configuration cannot be run exactly, in words.
    """

    model_type: str
    norm: NormKind = "rmsnorm"
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    attention_norm_after: str | None = None
    first: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    mlp_norm_after: str | None = None
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    gated: bool = True
    dropout: str | None = None
    mlp_dropout: str | None = None
    block_dropouts: tuple[str, ...] = ()
    attention_dropout: str = "attention_dropout"
    attention_shape: Callable[[Any, int], AttentionShape]
    activation: Callable[[Any], str] = field(default=lambda config: str(config.hidden_act))
    columns: Callable[[Any], Tensor] | None = None
    parallel: Callable[[Any], bool] = field(default=lambda config: False)
    refusals: Callable[[Any], list[str]] = field(default=lambda config: [])

    def read(self, model: Any) -> Decoder:
        """Return a causal language model of this family in normal form.

        Raises:
            UnsupportedModelError: a configuration that cannot be run exactly, or a model with other parts.
        """
        refuse_unless_supported(self, model.config)
        try:
            found = model.get_submodule(self.blocks)
        except AttributeError:
            found = None
        # The list itself: of a block that is in it twice, `children()` has one.
        children = list(found) if isinstance(found, nn.ModuleList | nn.Sequential) else []
        if not children:
            raise UnsupportedModelError(
                "the model has no decoder blocks where its family has them",
                got=type(model).__name__,
                expected=f"a model with a head, its blocks at {self.blocks}",
                hint="load it with AutoModelForCausalLM",
            )
        blocks = [self._block(model.config, i, f"{self.blocks}.{i}", block) for i, block in enumerate(children)]
        return Decoder(model, self.model_type, True, self.blocks, blocks, self.final_norm, self.norm)

    def _block(self, config: Any, index: int, path: str, block: nn.Module) -> Block:
        attention, mlp = self._attention(config, index, path, block), self._mlp(config, path, block)
        groups = (
            Group(attention.first, attention.norm, "attention in", "qkv", inner_in=False, inner_out=True),
            Group((attention.last,), None, "heads", "attention out", inner_in=True, inner_out=False),
            Group(mlp.first, mlp.norm, "mlp in", "hidden", inner_in=False, inner_out=True),
            Group((mlp.last,), None, "activations", "mlp out", inner_in=True, inner_out=False),
        )
        dropouts = tuple(find_module(block, name, path) for name in self.block_dropouts)
        return Block(index, path, block, groups, attention, mlp, self.parallel(config), dropouts)

    def _attention(self, config: Any, index: int, path: str, block: nn.Module) -> Attention:
        module, where = find_module(block, self.attention, path), f"{path}.{self.attention}"
        columns = None if self.columns is None else self.columns(config)
        first = tuple(find_layer(module, name, where, columns) for name in self.first)
        return Attention(
            name=self.attention,
            path=where,
            block=block,
            module=module,
            norm=self._norm(block, self.attention_norm, path),
            first=first,
            covers=_covers("qkv", first),
            last=find_layer(module, self.out, where),
            dropout=None if self.dropout is None else find_module(module, self.dropout, where),
            norm_after=self.attention_norm_after,
            shape=self.attention_shape(config, index),
            dropout_field=self.attention_dropout,
            index=index,
        )

    def _mlp(self, config: Any, path: str, block: nn.Module) -> Mlp:
        module, where = find_module(block, self.mlp, path), f"{path}.{self.mlp}"
        first = tuple(find_layer(module, name, where) for name in self.up)
        return Mlp(
            name=self.mlp,
            path=where,
            block=block,
            module=module,
            norm=self._norm(block, self.mlp_norm, path),
            first=first,
            covers=_covers("gu" if self.gated else "u", first),
            last=find_layer(module, self.down, where),
            dropout=None if self.mlp_dropout is None else find_module(module, self.mlp_dropout, where),
            norm_after=self.mlp_norm_after,
            gated=self.gated,
            activation=self.activation(config),
        )

    def _norm(self, block: nn.Module, name: str, path: str) -> Norm:
        module = find_module(block, name, path)
        norm = Norm(self.norm, block, name, f"{path}.{name}", module)
        of_kind = type(module) is nn.LayerNorm if self.norm == "layernorm" else _is_rms_norm(module)
        if not of_kind or getattr(module, "weight", None) is None:
            raise UnsupportedModelError(
                "norm", got=type(module).__name__, expected=self.norm, where=norm.path, hint=ONLY_INSIDE
            )
        return norm

    def layer_names(self) -> tuple[str, ...]:
        """Names of the large linear layers, as PEFT's ``target_modules`` has them."""
        return tuple(dict.fromkeys((*self.first, self.out, *self.up, self.down)))


def _covers(pieces: str, layers: tuple[Layer, ...]) -> tuple[str, ...]:
    return (pieces,) if len(layers) == 1 else tuple(pieces)


def _is_rms_norm(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("RMSNorm")


def refuse_unless_supported(spec: FamilySpec, config: Any) -> None:
    """Raise where the configuration asks for what the family's record does not cover.

    Raises:
        UnsupportedModelError: naming each such field.
    """
    refusals = spec.refusals(config)
    if getattr(config, "quantization_config", None) is not None:
        refusals = [*refusals, "quantization_config: quantized layers cannot be keyed"]
    if refusals:
        raise UnsupportedModelError(
            "this configuration cannot be protected exactly",
            got="; ".join(refusals),
            where=spec.model_type,
            hint=ONLY_INSIDE,
        )


def grouped_heads(config: Any, *, scale: float | None = None, **more: Any) -> AttentionShape:
    """The shape of an attention whose configuration has Llama's fields; rotary over the whole head unless told."""
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    if heads % kv_heads:
        raise UnsupportedModelError(
            "query heads that share no kv heads evenly", got=f"{heads} and {kv_heads}", hint=OWN_CONFIG
        )
    return AttentionShape(
        **{
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "scale": head_dim**-0.5 if scale is None else scale,
            "rotary": head_dim,
            **more,
        }
    )


def partial_rotary(head_dim: int, rope: Any) -> int:
    """How much of each head is rotated, by ``rope_parameters``: in whole planes, as stock code rounds."""
    width = int(head_dim * (rope or {}).get("partial_rotary_factor", 1.0))
    return width + width % 2


def interleaved(heads: int, head_dim: int) -> Tensor:
    """Columns ``q | k | v`` of a weight that is stored head by head, ``[q_0 | k_0 | v_0 | q_1 | ...]``."""
    stored = torch.arange(heads * 3 * head_dim).view(heads, 3, head_dim)
    return stored.transpose(0, 1).reshape(-1)
