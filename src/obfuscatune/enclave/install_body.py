r"""Keying all blocks under one rotation R of the residual stream, and putting one remote body in their place.

With the stream centred, ``C = I - 11^T/d``, and the norms folded, every block reads ``RMSNorm(x*) = RMSNorm(x) R`` and
writes rows under ``C R``:

    Wqkv* = R^-1 C W' [M|M^-T|N],  Wo* = N^-1 Wo C R,  bo* = bo C R,
    W1*   = R^-1 C W1' P,          W2* = P^T W2 C R,   b2* = b2 C R.

Source: our SECURITY analysis, section 4.3; centring as in SliceGPT (arXiv 2401.15024).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.enclave.body import PassedBlock, RemoteBody, adopt
from obfuscatune.enclave.folding import centre
from obfuscatune.enclave.install import Installer, Shipped, rank_keys
from obfuscatune.enclave.keys import Key
from obfuscatune.enclave.keys.source import Stream
from obfuscatune.enclave.lora import PushedPair
from obfuscatune.enclave.sites import Site, adapters_by_name, replace_whole


class BodyInstaller(Installer):
    """Keys and ships blocks as parts of one body; one per protected model.

    R comes from the randomness of the first weights that are keyed.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rotation: Key | None = None
        self._shipped: list[Shipped] = []
        self._pairs: list[PushedPair] = []
        self._blocks: dict[int, nn.Module] = {}

    def key_block(self, block: nn.Module, index: int, path: str) -> None:
        """Key and ship the two parts of one block."""
        super().key_block(block, index, path)
        self._blocks[index] = block

    def finish(self) -> None:
        """Join the parts to one segment, and note what will stand in the blocks' places."""
        fields = {
            "parts": [part.segment for part in self._shipped],
            "eps": [float(part.norm.eps) for part in self._shipped if part.norm is not None],
        }
        bias = torch.stack([part.key_out.apply(part.bias) for part in self._shipped])
        path, first = self.spec.blocks, min(self._blocks)
        segment = self._define(path, "body", fields, {"bias": bias}, self._shipped[0].first.weight.dtype)
        body = RemoteBody(
            self.session,
            segment=segment,
            layer=path,
            key=self._shipped[0].key_in,
            mirror=self._mirror,
            index=first,
            pairs=self._pairs,
        )
        parts = iter(self._shipped)
        for index, block in self._blocks.items():
            shell = body if index == first else PassedBlock()
            self._replacements.append(partial(self._replace, index, block, shell, next(parts), next(parts)))

    def _replace(self, index: int, block: nn.Module, shell: nn.Module, attention: Shipped, mlp: Shipped) -> None:
        names = {self.spec.attention: attention, self.spec.mlp: mlp}
        adopt(shell, block, {name: adapters_by_name(part.first, part.last) for name, part in names.items()})
        sites = (attention.first, attention.last, mlp.first, mlp.last)
        replace_whole(self.model.get_submodule(self.spec.blocks), str(index), shell, sites)

    # keys and shipping

    def _around(self, stream: Callable[[str], Stream], part: str, size: int) -> tuple[Key, Key]:
        if self._rotation is None:
            self._rotation = self._key(stream, "residual stream", size)
        return self._rotation, self._rotation

    def _reading(self, site: Site, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        # The direction 1 R is the one that nothing is written to, so the worker finds it, and what a weight has along
        # it: the sums of W' over its inputs, plain in the MLP up to order. Centred rows do not need it.
        weight, bias = site.folded(norm)
        return centre(weight.T).T, bias

    def _written(self, rows: Tensor) -> Tensor:
        return centre(rows.double())

    def _whole_attention(self, block: nn.Module, attention: nn.Module, index: int, where: str) -> None:
        self._note_dropout(attention, self.spec.attention, self.spec.dropout)
        self._add(self._ship_attention(block, attention, index, where), "qkv", "out")

    def _whole_mlp(self, block: nn.Module, mlp: nn.Module, where: str) -> None:
        self._note_dropout(mlp, self.spec.mlp, self.spec.mlp_dropout)
        self._add(self._ship_mlp(block, mlp, where), "up", "down")

    def _note_dropout(self, parent: nn.Module, name: str, child: str) -> None:
        if getattr(parent.get_submodule(child), "p", 0.0) > 0:
            self._dropout_off.append(f"{name}.{child}")

    # LoRA

    def _add(self, part: Shipped, first: str, last: str) -> None:
        gain, shift = (None, None) if part.norm is None else (part.norm.weight.detach(), part.norm.bias.detach())
        self._pair(part, part.first, first, part.key_in, key_out=part.key_first, gain=gain, shift=shift, reads=True)
        self._pair(part, part.last, last, part.key_last, key_out=part.key_out, shift=part.offset, writes=True)
        self._shipped.append(part)

    def _pair(self, part: Shipped, site: Site, slot: str, key: Key, **options: Any) -> None:
        if site.lora is None:
            return
        self._note_lora_dropout(site.lora)
        name, make = f"{len(self._shipped)}.{slot}", rank_keys(part.stream, slot)
        self._pairs.append(PushedPair(name, site.lora, site.path, make, key, **options))
