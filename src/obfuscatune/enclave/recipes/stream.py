r"""All blocks under one rotation R of the residual stream, and one remote body in their place (`stream`).

Where norms are LayerNorms the stream is centred, ``C = I - 11^T/d``; where they are RMSNorms, C = I. With the norms
folded, every block reads ``RMSNorm(x*) = RMSNorm(x) R`` and writes rows under ``C R``:

    Wqkv* = R^-1 C W' [M|M^-T|N],  Wo* = N^-1 Wo C R,  bo* = bo C R,
    W1*   = R^-1 C W1' P,          W2* = P^T W2 C R,   b2* = b2 C R.

Source: docs/design.md, "One call for all blocks"; centring as in SliceGPT (arXiv 2401.15024).
"""

from functools import partial

import torch
from torch import Tensor, nn

from obfuscatune.enclave.families import Block, Decoder, Layer
from obfuscatune.enclave.folding import centre
from obfuscatune.enclave.keys import Key
from obfuscatune.enclave.recipes.context import Keying, Streams, digest_of, rank_keys
from obfuscatune.enclave.recipes.whole import LAST, Around, Shipped, ship_attention, ship_mlp
from obfuscatune.enclave.remote.body import PassedBlock, Remaining, RemoteBody, adopt
from obfuscatune.enclave.remote.layers import replace_part, standins
from obfuscatune.enclave.remote.linear import Placed
from obfuscatune.enclave.remote.lora import PushedPair
from obfuscatune.enclave.remote.slot import Slot
from obfuscatune.enclave.remote.standing import Standing
from obfuscatune.errors import UnsupportedModelError


class Rotated(Around):
    """One rotation around all parts. It comes from the randomness of the first weights that are keyed.

    Args:
        centred: whether the stream is. label: of what else the rotation is to depend on: the norms of all blocks,
            because two gains of one weight under one rotation give it away (`Keying.streams`).
    """

    def __init__(self, centred: bool, label: str) -> None:
        self.centred, self._label = centred, label
        self._rotation: Key | None = None

    def keys(self, keying: Keying, stream: Streams, part: str, width: int) -> tuple[Key, Key]:
        """Return R twice."""
        if self._rotation is None:
            self._rotation = keying.key(stream, f"residual stream {self._label}", width)
        return self._rotation, self._rotation

    def read(self, columns: Tensor) -> Tensor:
        """Return ``C W``, or some columns of it.

        The direction 1 R is the one that nothing is written to, so the worker finds it, and what a weight has along
        it: the sums of W' over its inputs, plain in the MLP up to order. Centred rows do not need it.
        """
        return centre(columns.T).T if self.centred else columns

    def written(self, rows: Tensor) -> Tensor:
        """Return ``rows C``."""
        return centre(rows.double()) if self.centred else rows


class StreamRecipe:
    """Keys and ships blocks as parts of one body; one for each protected model."""

    def __init__(self, keying: Keying, decoder: Decoder) -> None:
        self._keying, self._decoder = keying, decoder
        norms = [part.norm for block in decoder.blocks[keying.profile.enclave_blocks :] for part in block.parts]
        folded = (tensor for norm in norms for tensor in (norm.gain, norm.shift))
        self._around = Rotated(decoder.norm == "layernorm", digest_of(*folded))
        self._shipped: list[Shipped] = []
        self._slots: list[Slot] = []
        self._blocks: list[Block] = []

    def key_block(self, block: Block) -> None:
        """Key and ship the two parts of one block."""
        keying = self._keying
        if block.attention is None or block.mlp is None:
            raise UnsupportedModelError(
                "rotate_stream needs a record of the model family",
                where=block.path,
                hint="take paper, strict or shared",
            )
        for part in block.parts:
            keying.fold(part.norm)
        for dropout in (*(part.dropout for part in block.parts), *block.dropouts):
            if dropout is not None:
                keying.note_dropout(_name(dropout, block.module), getattr(dropout, "p", 0.0))
        self._add(ship_attention(keying, block.attention, self._around))
        self._add(ship_mlp(keying, block.mlp, self._around))
        self._blocks.append(block)

    def finish(self) -> None:
        """Join the parts to one segment, and note what will stand in the blocks' places."""
        keying, first, parts = self._keying, self._blocks[0], self._shipped
        key, path, dtype = parts[0].key_in, self._decoder.blocks_path, parts[0].part.last.weight.dtype
        fields = {
            "parts": [part.segment for part in parts],
            "eps": [part.part.norm.eps for part in parts],
            "parallel": first.parallel,
        }
        zero = torch.zeros(key.size, dtype=torch.float64)
        bias = torch.stack([key.apply(zero if part.bias is None else part.bias) for part in parts])
        segment = keying.define(path, "body", fields, {"bias": bias}, dtype)
        remaining = Remaining()
        body = RemoteBody(
            Placed(keying.session, segment, path, key, key, None, dtype),
            centred=self._around.centred,
            mirror=keying.mirror,
            passes=keying.passes,
            index=first.index,
            passed=[block.index for block in self._blocks[1:]],
            remaining=remaining,
            slots=self._slots,
            offset=any(part.offset is not None for part in parts),
        )
        for block in self._blocks:
            shell = body if block is first else PassedBlock(block.path, keying.passes, remaining)
            keying.replacements.append(partial(self._replace, block, shell))
        keying.replacements.append(lambda: body.watch(self._standing()))
        keying.replacements.append(lambda: self._decoder.model.base_model.register_forward_hook(body.require_all))

    def _replace(self, block: Block, shell: nn.Module) -> None:
        adopt(shell, block.module, block.path, {part.name: standins(part) for part in block.parts})
        replace_part(self._list(), str(block.index), shell, tuple(block.layers))
        for slot in self._slots:
            for part in block.parts:
                if any(slot.lora is layer.lora for layer in part.layers):
                    slot.holder = shell.get_submodule(part.name)

    def _standing(self) -> Standing:
        return Standing(self._list(), [str(block.index) for block in self._blocks], self._decoder.blocks_path)

    def _list(self) -> nn.Module:
        """The list of all the model's blocks."""
        blocks: nn.Module = self._decoder.model.get_submodule(self._decoder.blocks_path)
        return blocks

    # LoRA

    def _add(self, shipped: Shipped) -> None:
        norm, centred = shipped.part.norm, self._around.centred
        key_in, key_out = shipped.key_in, shipped.key_out
        gain, shift = norm.gain.to(norm.module.weight.dtype, copy=True), norm.shift
        shift = None if shift is None else shift.clone()
        for i, (layer, key) in enumerate(zip(shipped.part.first, shipped.keys_first, strict=True)):
            self._pair(shipped, layer, f"in{i}", key_in=key_in, key_out=key, gain=gain, shift=shift, centred_in=centred)
        last, offset = shipped.part.last, shipped.offset
        self._pair(shipped, last, LAST, key_in=shipped.key_last, key_out=key_out, shift=offset, centred_out=centred)
        self._shipped.append(shipped)

    def _pair(
        self,
        shipped: Shipped,
        layer: Layer,
        slot: str,
        *,
        key_in: Key,
        key_out: Key,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
        centred_in: bool = False,
        centred_out: bool = False,
    ) -> None:
        if layer.lora is None:
            return
        self._keying.note_lora_dropout(layer)
        self._slots.append(
            PushedPair(
                f"{len(self._shipped)}.{slot}",
                layer,
                self._keying.passes,
                rank_keys(shipped.stream, slot),
                key_in=key_in,
                key_out=key_out,
                gain=gain,
                shift=shift,
                centred_in=centred_in,
                centred_out=centred_out,
            )
        )


def _name(child: nn.Module, module: nn.Module) -> str:
    return str(next(name for name, found in module.named_modules() if found is child))
