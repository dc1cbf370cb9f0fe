"""Whether what leaves for the worker is stock code: the worker computes that, and never a change made to a module.

A subclass under a known ``model_type``, a ``forward`` set on an instance or on a class of a library, or a hook would be
lost without a word when its module is replaced. Code that stays in the enclave may be changed at will. Other values of
a stock module's attributes are the matter of `made`.
"""

from collections.abc import Iterator

from torch import nn

from obfuscatune.enclave.families.form import Block, Part
from obfuscatune.enclave.hooks import own_code, replaced_function, set_on_class
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.profiles import Profile


def refuse_changed(blocks: list[Block], profile: Profile) -> None:
    """Refuse blocks whose code differs, where it leaves, from what the worker computes.

    Args:
        blocks: those that leave. profile: as it is run on this model.

    Raises:
        UnsupportedModelError: a class of its own, a forward of one instance or set on a class, or a hook, with the
            module's path.
    """
    for block in blocks:
        for module, path, replaced in _leaving(block, profile):
            if replaced and not type(module).__module__.startswith("transformers.models."):
                got = f"{type(module).__module__}.{type(module).__qualname__}"
                raise _changed("a class of its own", path, got)
            if (own := own_code(module)) is not None:
                raise _changed(own, path)
            if (source := set_on_class(type(module))) is not None:
                raise _changed(f"a forward that was set on {type(module).__qualname__}", path, source)
            if (found := replaced_function(type(module))) is not None:
                raise _changed(f"a function that was replaced, {found[0]}", path, found[1])
            if getattr(module, "is_causal", True) is not True:
                raise _changed("attention in both directions (is_causal=False)", path)


def _changed(what: str, path: str, got: str | None = None) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"a module that leaves for the worker has {what}, which would be lost there",
        got=got,
        expected="stock code of transformers",
        where=path,
        hint="profiles that send linear layers alone (strict, paper) run changed code of attention, MLP and blocks",
    )


def _leaving(block: Block, profile: Profile) -> Iterator[tuple[nn.Module, str, bool]]:
    """Modules of a block that are not called any more, their paths, and whether the worker stands for their code."""
    if profile.rotate_stream:
        yield block.module, block.path, True
        yield from ((module, f"{block.path}.{name}", False) for name, module in block.module.named_modules() if name)
    for part in block.parts:
        if _whole(part, block, profile):
            yield part.module, part.path, True
            yield from ((module, f"{part.path}.{name}", False) for name, module in part.module.named_modules() if name)
        if profile.fold_norms:
            yield part.norm.module, part.norm.path, False
    for layer in block.layers:
        yield layer.base, layer.path, False
        if layer.lora is not None and profile.lora_placement != "enclave":
            yield from ((module, f"{layer.path}.{name}", False) for name, module in layer.lora.named_modules() if name)


def _whole(part: Part, block: Block, profile: Profile) -> bool:
    return (profile.attention if part is block.attention else profile.mlp) == "worker"
