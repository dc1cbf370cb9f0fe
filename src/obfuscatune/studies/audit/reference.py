"""A plain model in the coordinates that a profile keys: of the private model the truth, of a public one the knowledge.

Streams and roles are named as in `obfuscatune.studies.audit.view`. All in float64.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from obfuscatune.enclave.families import AttentionShape, Layer, Norm, Part, read_decoder
from obfuscatune.enclave.folding import centre, fold_norm
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.profiles import Profile
from obfuscatune.protocol.norms import rms_rows
from obfuscatune.studies.audit.view import ROLES, STREAMS, STREAMS_OF

Streams = dict[tuple[int, str], Tensor]


@dataclass(frozen=True, slots=True, repr=False)
class Design:
    """What a model's configuration says of its computation: public, and no secret of any profile.

    Attributes:
        shape: of every attention. gated, activation: of every MLP. eps: of the norms.
        rotary: cos and sin ``[1, T, n]`` of all positions, float64; None where q and k are not rotated.
        embedded_positions: whether positions have rows of their own in the residual stream.
    """

    shape: AttentionShape
    gated: bool
    activation: str
    eps: float
    rotary: tuple[Tensor, Tensor] | None
    embedded_positions: bool

    def angles(self, length: int) -> tuple[Tensor, Tensor] | None:
        """Cos and sin of the first positions ``[1, length, n]``."""
        return None if self.rotary is None else (self.rotary[0][:, :length], self.rotary[1][:, :length])


class Reference:
    """Weights and streams of a plain causal language model, norms folded and biases in place as the profile has them.

    Attributes:
        config: of the model. blocks: how many. width: of the residual stream.
    """

    def __init__(self, model: Any, profile: Profile) -> None:
        self._model = copy.deepcopy(model).double().eval()
        self.config, self._profile = model.config, profile
        self._decoder = read_decoder(self._model)
        self._blocks = self._decoder.blocks
        self.blocks, self.width = len(self._blocks), self._decoder.width

    def only(self, run: range) -> "Reference":
        """The same model where only these blocks are of interest, numbered from 0: the part that some workers have."""
        part = copy.copy(self)
        part._blocks = self._blocks[run.start : run.stop]
        part.blocks = len(part._blocks)
        return part

    def design(self) -> Design:
        """What everyone may know of the model.

        Raises:
            UnsupportedModelError: a family without a record.
        """
        block = self._blocks[0]
        if block.attention is None or block.mlp is None:
            raise UnsupportedModelError("attention of a family without a record", where=self._decoder.family)
        return Design(
            shape=block.attention.shape,
            gated=block.mlp.gated,
            activation=block.mlp.activation,
            eps=block.attention.norm.eps,
            rotary=self._rotary(),
            embedded_positions=self._places() is not None,
        )

    def weight(self, block: int, role: str) -> Tensor:
        """Plain ``[in, out]`` weight, the norm's gain folded in where the profile folds."""
        return self._folded(block, role)[0]

    def bias(self, block: int, role: str) -> Tensor:
        """Plain ``[out]`` bias, the norm's shift folded in where the profile folds."""
        return self._folded(block, role)[1]

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Tables of tokens ``[vocab, d]`` and positions ``[n, d]``, zero where positions are not embedded."""
        words, places = self._model.get_input_embeddings().weight.detach(), self._places()
        return words, words.new_zeros(self.config.max_position_embeddings, self.width) if places is None else places

    def first_rows(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The ``attention in`` ``[n, d]`` of the model's first block, of tokens ``[n]`` at positions ``[n]`` alone."""
        rows = self._model.get_input_embeddings()(tokens) + self.embeddings()[1][positions]
        return self._normed(self._decoder.blocks[0].parts[0].norm, rows.detach())

    def normed(self, block: int, role: str, residual: Tensor) -> Tensor:
        """What goes into ``qkv`` or ``up`` of a block ``[n, d]``, of rows of the residual stream there."""
        return self._normed(self._part(block, role).norm, residual)

    @torch.no_grad()
    def streams(self, batches: Iterable[Tensor], names: Iterable[str] = STREAMS) -> Streams:
        """Rows ``[n, width]`` by block and stream, for batches of tokens ``[B, T]`` one after another."""
        wanted, kept = set(names), dict[tuple[int, str], list[Tensor]]()
        hooks = [hook for i in range(self.blocks) for hook in self._watch(i, wanted, kept)]
        try:
            for batch in batches:
                self._model(input_ids=batch, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return {place: torch.cat(parts) for place, parts in kept.items()}

    @torch.no_grad()
    def logits(self, batch: Tensor) -> Tensor:
        """Next-token logits ``[B, T, vocab]``."""
        return self._model(input_ids=batch, use_cache=False).logits  # type: ignore[no-any-return]

    def _places(self) -> Tensor | None:
        """Table of positions ``[n, d]``, where they are embedded."""
        places = getattr(self._model.base_model, "wpe", None)
        return None if places is None else places.weight.detach()

    def _rotary(self) -> tuple[Tensor, Tensor] | None:
        module = getattr(self._model.base_model, "rotary_emb", None)
        if module is None:
            return None
        cos, sin = module(self.embeddings()[0][:1], torch.arange(self.config.max_position_embeddings)[None])
        return cos.double(), sin.double()

    def _part(self, block: int, role: str) -> Part:
        attention, mlp = self._blocks[block].parts
        return attention if role in ("qkv", "out") else mlp

    def _folded(self, block: int, role: str) -> tuple[Tensor, Tensor]:
        part = self._part(block, role)
        if role in ("out", "down"):
            weight, bias = self._written(part.last.weight), part.last.bias
            bias = None if bias is None else self._written(bias)
        else:
            weight, bias = part.first_weight(), part.first_bias()
            if self._profile.fold_norms:
                weight, bias = fold_norm(weight, bias, part.norm.gain, part.norm.shift)
        return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias

    @property
    def _centred(self) -> bool:
        """Whether the profile centres the residual stream of this model."""
        return self._profile.rotate_stream and self._decoder.norm == "layernorm"

    def _written(self, rows: Tensor) -> Tensor:
        """What is added to the residual stream, as the profile has it."""
        return centre(rows) if self._centred else rows

    def _normed(self, norm: Norm, residual: Tensor) -> Tensor:
        if not self._profile.fold_norms:
            return norm.module(residual)  # type: ignore[no-any-return]
        if norm.kind == "layernorm":
            return F.layer_norm(residual, residual.shape[-1:], eps=norm.eps)
        return rms_rows(residual, norm.eps)

    def _watch(self, block: int, wanted: set[str], kept: dict[Any, list[Tensor]]) -> Iterable[Any]:
        """Hooks on a block's linear layers that keep rows in and out."""
        whole = {"qkv": self._profile.attention == "worker", "up": self._profile.mlp == "worker"}
        folds = self._profile.fold_norms
        for role in ROLES:
            part, first = self._part(block, role), role in ("qkv", "up")
            into, out = STREAMS_OF[role]
            if into in wanted and first and folds:
                yield part.norm.module.register_forward_pre_hook(
                    lambda _, args, into=into, norm=part.norm: _keep(kept, (block, into), self._normed(norm, args[0]))
                )
            layers = part.first if first else (part.last,)
            outputs: list[Tensor] = []

            def hook(
                _: Any,
                args: Any,
                y: Tensor,
                *,
                layer: Layer,
                role: str = role,
                outputs: list[Tensor] = outputs,
                count: int = len(layers),
                first: bool = first,
            ) -> None:
                into, out = STREAMS_OF[role]
                # What returns to the enclave comes without its bias, which is added there; a whole body adds it itself.
                bias = None if whole.get(role) or self._profile.rotate_stream else layer.bias
                outputs.append(layer.canonical(y if bias is None else y - bias))
                if len(outputs) < count:  # layers side by side make one stream
                    return
                if into in wanted and not (first and folds):
                    _keep(kept, (block, into), args[0])
                if out in wanted:
                    rows = torch.cat(outputs, dim=-1)
                    _keep(kept, (block, out), rows if first else self._written(rows))
                outputs.clear()

            if into in wanted or out in wanted:
                for layer in layers:
                    yield layer.base.register_forward_hook(partial(hook, layer=layer))


def _keep(kept: dict[Any, list[Tensor]], place: tuple[int, str], rows: Tensor) -> None:
    kept.setdefault(place, []).append(rows.detach().flatten(0, -2).clone())
