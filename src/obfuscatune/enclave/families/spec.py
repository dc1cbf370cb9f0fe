"""What a model family is: a record of where each role of a decoder block lives and how it is laid out.

The algorithms of this package speak of roles only (``qkv``, ``out``, ``up``, ``down``, ...). A family is chosen by
``config.model_type``, never by a model's name, and what a record does not cover is refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from obfuscatune.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Heads, width of one head, and the factor on q k^T, of one layer."""

    heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySpec:
    """Where each role of the family's blocks lives, relative to the causal language model or to its block.

    Attributes:
        model_type: the value of ``config.model_type``.
        blocks: path of the list of decoder blocks.
        final_norm: path of the norm after the last block.
        attention, attention_norm, mlp, mlp_norm: paths of the submodules, relative to a block.
        qkv, out: paths of the fused q,k,v projection and of the output projection, relative to ``attention``.
        up, down: paths of the MLP's two projections, relative to ``mlp``.
        in_out: whether weights are stored ``[in, out]`` (``Conv1D``) rather than ``[out, in]`` (``nn.Linear``).
        dropout, mlp_dropout: paths of the dropout on the output, relative to ``attention`` and to ``mlp``.
        attention_dropout: name of the config field with the dropout on attention weights.
        attention_shape: ``(config, layer) -> AttentionShape``.
        width, hidden: ``config -> `` width of the residual stream, and of the MLP.
        activation: ``config -> `` name of the MLP's activation function as ``transformers`` calls it.
        refusals: ``config -> `` what of this configuration cannot be run exactly, in words.
    """

    model_type: str
    blocks: str
    final_norm: str
    attention: str
    attention_norm: str
    mlp: str
    mlp_norm: str
    qkv: str
    out: str
    up: str
    down: str
    in_out: bool
    dropout: str
    mlp_dropout: str
    attention_dropout: str
    attention_shape: Callable[[Any, int], AttentionShape]
    width: Callable[[Any], int]
    hidden: Callable[[Any], int]
    activation: Callable[[Any], str]
    refusals: Callable[[Any], list[str]]

    def linears(self) -> tuple[tuple[str, str], ...]:
        """Return ``(parent, child)`` paths of the four large linear layers of a block."""
        return (
            (self.attention, self.qkv),
            (self.attention, self.out),
            (self.mlp, self.up),
            (self.mlp, self.down),
        )

    def iter_blocks(self, causal_lm: nn.Module) -> Iterator[tuple[int, str, nn.Module]]:
        """Yield ``(index, path, block)`` for each decoder block."""
        for index, block in enumerate(causal_lm.get_submodule(self.blocks).children()):
            yield index, f"{self.blocks}.{index}", block

    def weight_in_out(self, linear: nn.Module) -> torch.Tensor:
        """Return the weight of a linear layer as ``[in, out]``, without copying."""
        weight: torch.Tensor = linear.weight.detach()  # type: ignore[operator]
        return weight if self.in_out else weight.T


def refuse_unless_supported(spec: FamilySpec, config: Any) -> None:
    """Raise where the configuration asks for what the family's record does not cover.

    Raises:
        UnsupportedModelError: naming each such field.
    """
    refusals = spec.refusals(config)
    if refusals:
        raise UnsupportedModelError(
            "this configuration cannot be protected exactly", got="; ".join(refusals), where=spec.model_type
        )
