"""Whether each layer that leaves is there once: a block, part or weight that stands at two places is not keyed twice.

A merged model may have one block several times in its list, and code may tie one layer's weight to another's. Each
layer is keyed, and replaced, by itself; what is done to one of them later would not be done to the other.
"""

from obfuscatune.enclave.families.form import Decoder
from obfuscatune.errors import ONLY_INSIDE, UnsupportedModelError


def refuse_shared(decoder: Decoder) -> None:
    """Refuse a weight of two layers, or of a layer and a module outside the blocks; raises UnsupportedModelError."""
    seen: dict[int, str] = {}
    for name, parameter in decoder.model.named_parameters(remove_duplicate=False):
        if not name.startswith(f"{decoder.blocks_path}."):
            seen.setdefault(id(parameter), name)
    for layer in (layer for block in decoder.blocks for layer in block.layers):
        other = seen.setdefault(id(layer.base.weight), layer.path)
        if other != layer.path:
            raise UnsupportedModelError("a weight that two layers share", got=other, where=layer.path, hint=ONLY_INSIDE)
