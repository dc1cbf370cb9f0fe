"""A plain model in the coordinates that a profile keys: of the private model the truth, of a public one the knowledge.

Streams and roles are named as in `obfuscatune.studies.audit.view`. All in float64.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from obfuscatune.enclave.families import AttentionShape, family_of
from obfuscatune.enclave.folding import centre, fold_norm
from obfuscatune.profiles import Profile
from obfuscatune.studies.audit.view import ROLES, STREAMS, STREAMS_OF

Streams = dict[tuple[int, str], Tensor]


class Reference:
    """Weights and streams of a plain causal language model, norms folded and biases in place as the profile has them.

    Attributes:
        config: of the model. blocks: how many. width: of the residual stream.
    """

    def __init__(self, model: Any, profile: Profile) -> None:
        self._model = copy.deepcopy(model).double().eval()
        self._spec, self.config, self._profile = family_of(model.config), model.config, profile
        self._blocks = [block for _, _, block in self._spec.iter_blocks(self._model)]
        self.blocks, self.width = len(self._blocks), self._spec.width(model.config)

    def shape(self, block: int) -> AttentionShape:
        """Heads, their width, and the scale of q k^T."""
        return self._spec.attention_shape(self.config, block)

    def weight(self, block: int, role: str) -> Tensor:
        """Plain ``[in, out]`` weight, the norm's gain folded in where the profile folds."""
        return self._folded(block, role)[0]

    def bias(self, block: int, role: str) -> Tensor:
        """Plain ``[out]`` bias, the norm's shift folded in where the profile folds."""
        return self._folded(block, role)[1]

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Tables of tokens ``[vocab, d]`` and positions ``[n, d]``."""
        transformer = self._model.transformer
        return transformer.wte.weight.detach(), transformer.wpe.weight.detach()

    def first_rows(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The first block's ``attention in`` ``[n, d]`` of tokens ``[n]`` at positions ``[n]``, which alone make it."""
        words, places = self.embeddings()
        return self.normed(0, "qkv", words[tokens] + places[positions])

    def normed(self, block: int, role: str, residual: Tensor) -> Tensor:
        """What goes into ``qkv`` or ``up`` of a block ``[n, d]``, of rows of the residual stream there."""
        norm = self._spec.attention_norm if role == "qkv" else self._spec.mlp_norm
        return self._normed(self._blocks[block].get_submodule(norm), residual)

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

    def _linear(self, block: int, role: str) -> tuple[nn.Module, nn.Module | None]:
        spec = self._spec
        parent = spec.attention if role in ("qkv", "out") else spec.mlp
        norm = {"qkv": spec.attention_norm, "up": spec.mlp_norm}.get(role)
        module = self._blocks[block]
        linear = module.get_submodule(parent).get_submodule(getattr(spec, role))
        return linear, None if norm is None else module.get_submodule(norm)

    def _folded(self, block: int, role: str) -> tuple[Tensor, Tensor]:
        linear, norm = self._linear(block, role)
        weight, bias = self._spec.weight_in_out(linear), linear.bias.detach()  # type: ignore[operator]
        if role in ("out", "down"):
            return self._written(weight), self._written(bias)
        if norm is None or not self._profile.fold_norms:
            return weight, bias
        return fold_norm(weight, bias, norm.weight.detach(), norm.bias.detach())  # type: ignore[operator]

    def _written(self, rows: Tensor) -> Tensor:
        """What is added to the residual stream, as the profile has it."""
        return centre(rows) if self._profile.rotate_stream else rows

    def _normed(self, norm: Any, residual: Tensor) -> Tensor:
        if self._profile.fold_norms:
            return F.layer_norm(residual, norm.normalized_shape, eps=norm.eps)
        return norm(residual)  # type: ignore[no-any-return]

    def _watch(self, block: int, wanted: set[str], kept: dict[Any, list[Tensor]]) -> Iterable[Any]:
        """Hooks on a block's four linear layers that keep rows in and out."""
        whole = {"qkv": self._profile.attention == "worker", "up": self._profile.mlp == "worker"}
        for role in ROLES:
            linear, norm = self._linear(block, role)
            into, out = STREAMS_OF[role]
            if norm is not None and self._profile.fold_norms and into in wanted:
                yield norm.register_forward_pre_hook(
                    lambda norm, args, into=into: _keep(kept, (block, into), self._normed(norm, args[0]))
                )
            # What returns to the enclave comes without its bias, which is added there.
            bias: Any = 0.0 if whole.get(role) else linear.bias

            def hook(_: Any, args: Any, y: Tensor, role: str = role, norm: Any = norm, bias: Any = bias) -> None:
                into, out = STREAMS_OF[role]
                if into in wanted and (norm is None or not self._profile.fold_norms):
                    _keep(kept, (block, into), args[0])
                if out in wanted:
                    _keep(kept, (block, out), self._written(y - bias) if norm is None else y - bias)

            if into in wanted or out in wanted:
                yield linear.register_forward_hook(hook)


def _keep(kept: dict[Any, list[Tensor]], place: tuple[int, str], rows: Tensor) -> None:
    kept.setdefault(place, []).append(rows.detach().flatten(0, -2).clone())
