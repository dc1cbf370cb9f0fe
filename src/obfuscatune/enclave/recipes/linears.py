"""Linear layers alone on the worker: everything between them returns to the enclave (`paper`, `naive`, `strict`)."""

from functools import partial

import torch

from obfuscatune.enclave.families import Group
from obfuscatune.enclave.folding import fold_shift, key_weight
from obfuscatune.enclave.freivalds import Check
from obfuscatune.enclave.keys import ConcatKey, Key
from obfuscatune.enclave.recipes.context import Keying, Streams, rank_keys
from obfuscatune.enclave.remote.layers import replace_linear
from obfuscatune.enclave.remote.linear import KeyedGroup, LinearGroup, Placed, RemoteLinear
from obfuscatune.enclave.remote.lora import SplitInput
from obfuscatune.enclave.remote.mixed import MixedGroup
from obfuscatune.enclave.remote.slot import Slot


def key_group(keying: Keying, group: Group) -> None:
    """Key and ship the layers of a group as one segment; a key of its own for each layer's output.

    The output keys do not mix layers: what a layer's LoRA adds, and learns on the worker, stays in its own columns.
    """
    profile, layers = keying.profile, group.layers
    keying.open(*layers)
    path = layers[0].path if len(layers) == 1 else ", ".join(layer.path for layer in layers)
    stream = keying.streams(path, *layers, norm=group.norm)
    width, dtype = layers[0].shape[0], layers[0].weight.dtype
    key_in = keying.key(stream, group.reads, width, inner=group.inner_in)
    names = [group.writes if len(layers) == 1 else f"{group.writes} {i}" for i in range(len(layers))]
    keys_out = [
        keying.key(stream, name, layer.shape[1], inner=group.inner_out)
        for name, layer in zip(names, layers, strict=True)
    ]
    key_out = keys_out[0] if len(keys_out) == 1 else ConcatKey(keys_out)
    weights = [layer.weight for layer in layers]
    weight = torch.cat(weights, dim=1) if len(weights) > 1 else weights[0]
    keyed = key_weight(weight, key_in, key_out, read=keying.read(group.norm), dtype=dtype)
    if profile.mix_rows and dtype == torch.bfloat16:
        keyed = keyed.float()  # rows of the noise's size would lose two of three digits
    widths = [layer.shape[1] for layer in layers]
    segment = keying.define(path, "linear", {"widths": widths}, {"weight": keyed}, keyed.dtype)
    check = Check(keyed, keying.checks) if profile.verify else None
    placed = Placed(keying.session, segment, path, key_in, key_out, keying.fold(group.norm), dtype)
    slots: dict[int, Slot] = {}
    together: LinearGroup
    if profile.mix_rows:
        together = MixedGroup(
            placed, widths, wire_dtype=keyed.dtype, mixer=keying.mixer, tile=profile.mix_tile, check=check
        )
    else:
        slots = _slots(keying, group, stream, segment, key_in, keys_out)
        together = KeyedGroup(placed, widths, check=check, slots=slots)
    shift = group.norm.shift if group.norm is not None and profile.fold_norms else None
    for i, layer in enumerate(layers):
        bias = fold_shift(layer.weight, layer.bias, shift)
        remote = RemoteLinear(layer.path, together, i, None if bias is None else bias.to(dtype))
        keying.replacements.append(partial(replace_linear, layer, remote, with_lora=i in slots))


def _slots(
    keying: Keying, group: Group, stream: Streams, segment: str, key_in: Key, keys_out: list[Key]
) -> dict[int, Slot]:
    """LoRA of a placement that PEFT's own layers do not compute, by layer."""
    slots: dict[int, Slot] = {}
    placement = keying.profile.lora_placement
    for i, layer in enumerate(group.layers):
        name = f"in{i}"
        if layer.lora is None or placement == "enclave":
            continue
        plain = layer.in_stored_order()
        if placement == "split":
            apart = len(group.layers) > 1
            slots[i] = SplitInput(name, plain, keying.passes, rank_keys(stream, name), keys_out[i], apart=apart)
        else:
            slots[i] = keying.hold(name, plain, segment, key_in, keys_out[i], stream)
    return slots
