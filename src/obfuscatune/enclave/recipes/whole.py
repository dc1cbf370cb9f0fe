"""Attention or MLP whole on the worker, with what is between their layers (`plain`, `balanced`, parts of `stream`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from obfuscatune.enclave.families import Attention, Block, Mlp, Part
from obfuscatune.enclave.folding import Read, key_attention, key_mlp
from obfuscatune.enclave.keys import ConcatKey, HeadKeys, IdentityKey, Key, build, head_keys
from obfuscatune.enclave.keys.diagonal import gated_keys
from obfuscatune.enclave.recipes.context import Keying, Streams, rank_keys
from obfuscatune.enclave.remote.layers import replace_part, standins
from obfuscatune.enclave.remote.linear import Placed
from obfuscatune.enclave.remote.lora import SplitInput, SplitOutput
from obfuscatune.enclave.remote.slot import Slot
from obfuscatune.enclave.remote.whole import RemoteAttention, RemoteMlp, RemotePart
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.protocol.activations import ACTIVATION_NAMES

PartT = TypeVar("PartT", bound=Part)

LAST = "out"  # name of the slot of a part's last layer; those of its first ones are in0, in1, ...


@dataclass(frozen=True, slots=True, repr=False)  # a repr would show secret biases
class Shipped:
    """A part whose keyed weights the worker has, and what the enclave needs to use it.

    Attributes:
        segment: its name on the worker. stream: randomness by name.
        keys_first: of each first layer's columns, canonical. key_last: of what enters the last layer on the worker.
        bias: ``[d]``, float64, of the un-keyed output, or None. own_bias: of rows that attend to nothing, likewise.
        offset: what the true input of the last layer has more than the worker's, or None.
    """

    part: Part
    segment: str
    stream: Streams
    key_in: Key
    key_out: Key
    keys_first: tuple[Key, ...]
    key_last: Key
    bias: Tensor | None
    own_bias: Tensor | None = None
    offset: Tensor | None = None


class Around:
    """Keys around a part, and what it reads and writes. `stream` has others: see there."""

    def keys(self, keying: Keying, stream: Streams, part: str, width: int) -> tuple[Key, Key]:
        """Return the keys of what enters and of what leaves."""
        return keying.key(stream, f"{part} in", width), keying.key(stream, f"{part} out", width)

    def read(self, columns: Tensor) -> Tensor:
        """Return, for columns ``[d, n]`` of a weight that reads the residual stream, float64, the worker's."""
        return columns

    def written(self, rows: Tensor) -> Tensor:
        """Return, for rows ``[..., d]`` that write the residual stream (a weight's, a bias), what the worker writes."""
        return rows


def key_attention_part(keying: Keying, block: Block) -> None:
    """Key and ship a block's attention, and note its replacement."""
    attention = _known(block.attention, block)
    shipped = ship_attention(keying, attention, Around())
    remote = RemoteAttention(
        _placed(keying, shipped),
        mirror=keying.mirror,
        passes=keying.passes,
        index=attention.index,
        bias=_rounded(shipped, shipped.bias),
        own_bias=_rounded(shipped, shipped.own_bias),
        dropout=attention.dropout,
        slots=_slots(keying, shipped),
        children=standins(attention),
    )
    _replace(keying, attention, remote)


def key_mlp_part(keying: Keying, block: Block) -> None:
    """Key and ship a block's MLP, and note its replacement."""
    mlp = _known(block.mlp, block)
    shipped = ship_mlp(keying, mlp, Around())
    remote = RemoteMlp(
        _placed(keying, shipped),
        bias=_rounded(shipped, shipped.bias),
        dropout=mlp.dropout,
        slots=_slots(keying, shipped),
        children=standins(mlp),
    )
    _replace(keying, mlp, remote)


def ship_attention(keying: Keying, attention: Attention, around: Around) -> Shipped:
    """Key q,k,v, the attention and its output projection as one, and ship them.

    Raises:
        UnsupportedModelError: norms on q and k.
    """
    profile, shape = keying.profile, attention.shape
    if shape.head_norms:
        raise UnsupportedModelError(
            "attention whose q and k are normalized in each head cannot run on the worker: no key commutes with that",
            where=attention.path,
            hint='attention="enclave"',
        )
    keying.open(*attention.layers)
    stream = keying.streams(attention.path, *attention.layers, norm=attention.norm)
    key_in, key_out = around.keys(keying, stream, "attention", attention.width)
    heads = _head_keys(keying, attention, stream)
    # Held LoRA of the output layer sees the heads' output as it is on the worker, so it must be the true one.
    secret_biases = profile.head_keys and profile.lora_placement != "worker"
    weight, bias = keying.first_of(attention)
    last = attention.last
    keyed = key_attention(
        first=(weight, bias),
        last=(around.written(last.weight), None if last.bias is None else around.written(last.bias)),
        key_in=key_in,
        heads=heads,
        key_out=key_out,
        kv_heads=shape.kv_heads,
        rotated=shape.rotary > 0,
        stream=stream("biases") if secret_biases else None,
        read=_read(keying, attention, around),
        dtype=last.weight.dtype,
    )
    fields: dict[str, Any] = {
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "scale": float(shape.scale),
        "rotary": shape.rotary,
        "softcap": None if shape.softcap is None else float(shape.softcap),
    }
    by_piece: dict[str, Key] = {"q": heads.q, "k": heads.k, "v": heads.v}
    keys_first = _keys_of_layers(attention, by_piece)
    fields["widths"] = [key.size for key in keys_first]
    segment = keying.define(attention.path, "attention", fields, keyed.keyed, last.weight.dtype)
    keying.note_dropout(attention.dropout_field, attention.dropout_of_weights)
    keys = key_in, key_out, keys_first, heads.output
    return Shipped(attention, segment, stream, *keys, keyed.bias, keyed.own_bias, keyed.value_offset)


def _head_keys(keying: Keying, attention: Attention, stream: Streams) -> HeadKeys:
    shape = attention.shape
    if not keying.profile.head_keys:
        q, kv = IdentityKey(shape.query_width), IdentityKey(shape.kv_width)
        return HeadKeys(q, kv, kv, q)
    return head_keys(
        stream("heads"),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rotary=shape.rotary,
        kappa=keying.profile.head_kappa,
    )


def ship_mlp(keying: Keying, mlp: Mlp, around: Around) -> Shipped:
    """Key an MLP as one, and ship it.

    Raises:
        UnsupportedModelError: an activation that the worker does not have.
    """
    profile = keying.profile
    if mlp.activation not in ACTIVATION_NAMES:
        expected = f"one of {', '.join(ACTIVATION_NAMES)}"
        raise UnsupportedModelError(
            "the worker does not know the activation", got=mlp.activation, expected=expected, hint='mlp="enclave"'
        )
    keying.open(*mlp.layers)
    stream = keying.streams(mlp.path, *mlp.layers, norm=mlp.norm)
    key_in, key_out = around.keys(keying, stream, "mlp", mlp.width)
    hidden = mlp.last.shape[0]
    by_piece: dict[str, Key]
    if mlp.gated:
        gate, up = gated_keys(stream("neurons"), hidden, permute=profile.permute_mlp)
        by_piece = {"g": gate, "u": up}
    else:
        by_piece = {"u": build("permutation" if profile.permute_mlp else "identity", stream("neurons"), hidden)}
    key_last = by_piece["u"]
    weight, bias = keying.first_of(mlp)
    keyed = key_mlp(
        first=(weight, bias),
        last=around.written(mlp.last.weight),
        key_in=key_in,
        key_first=_concat(tuple(by_piece.values())),
        key_last=key_last,
        key_out=key_out,
        read=_read(keying, mlp, around),
        dtype=mlp.last.weight.dtype,
    )
    keys_first = _keys_of_layers(mlp, by_piece)
    fields = {"activation": mlp.activation, "gated": mlp.gated, "widths": [key.size for key in keys_first]}
    segment = keying.define(mlp.path, "mlp", fields, keyed, mlp.last.weight.dtype)
    bias_out = None if mlp.last.bias is None else around.written(mlp.last.bias).double()
    return Shipped(mlp, segment, stream, key_in, key_out, keys_first, key_last, bias_out)


def _read(keying: Keying, part: Part, around: Around) -> Read:
    folded = keying.read(part.norm)
    return lambda columns: around.read(folded(columns))


def _keys_of_layers(part: Part, by_piece: dict[str, Key]) -> tuple[Key, ...]:
    return tuple(_concat(tuple(by_piece[piece] for piece in pieces)) for pieces in part.covers)


def _concat(keys: tuple[Key, ...]) -> Key:
    return keys[0] if len(keys) == 1 else ConcatKey(keys)


def _placed(keying: Keying, shipped: Shipped) -> Placed:
    part = shipped.part
    folded = keying.fold(part.norm)
    dtype = part.last.weight.dtype
    return Placed(keying.session, shipped.segment, part.path, shipped.key_in, shipped.key_out, folded, dtype)


def _rounded(shipped: Shipped, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(shipped.part.last.weight.dtype)


def _replace(keying: Keying, part: Part, remote: RemotePart) -> None:
    keying.replacements.append(lambda: replace_part(part.block, part.name, remote, part.layers))


def _slots(keying: Keying, shipped: Shipped) -> Sequence[Slot]:
    """LoRA of a part's layers."""
    slots: list[Slot] = []
    part, last = shipped.part, shipped.part.last
    held = keying.profile.lora_placement == "worker"
    for i, (layer, key) in enumerate(zip(part.first, shipped.keys_first, strict=True)):
        name = f"in{i}"
        if layer.lora is None:
            continue
        if held:
            slots.append(keying.hold(name, layer, shipped.segment, shipped.key_in, key, shipped.stream))
        else:
            slots.append(SplitInput(name, layer, keying.passes, rank_keys(shipped.stream, name), key))
    if last.lora is not None and held:
        slots.append(keying.hold(LAST, last, shipped.segment, shipped.key_last, shipped.key_out, shipped.stream))
    elif last.lora is not None:
        offset = None if shipped.offset is None else shipped.offset.to(last.weight.dtype)
        make = rank_keys(shipped.stream, LAST)
        slots.append(SplitOutput(LAST, last, keying.passes, make, shipped.key_last, offset))
        keying.note_lora_dropout(last)
    return slots


def _known(part: PartT | None, block: Block) -> PartT:
    if part is None:
        raise UnsupportedModelError(
            "attention and MLP of this model are not known, so that neither can run whole on the worker",
            where=block.path,
            hint="profiles that send linear layers alone need no record of the family: paper, naive, strict",
        )
    return part
