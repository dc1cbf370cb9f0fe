"""Whether what leaves for the worker is stock code: the worker computes that, and never a change made to a module.

A subclass under a known ``model_type``, a ``forward`` set on an instance, or a hook would be lost without a word when
its module is replaced. Code that stays in the enclave may be changed at will. Not seen are other values of a stock
module's attributes, such as another activation than the configuration's.
"""

from collections.abc import Iterator

from torch import nn

from obfuscatune.enclave.families.form import Block, Part
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.profiles import Profile

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks that transformers leaves after the first call that asked for hidden states or attention weights. They do nothing
# unless these are asked for again, which `protect` refuses where they are on the worker.
_HARMLESS = "transformers.utils.output_capturing"


def refuse_changed(blocks: list[Block], profile: Profile) -> None:
    """Refuse blocks whose code differs, where it leaves, from what the worker computes.

    Args:
        blocks: those that leave. profile: as it is run on this model.

    Raises:
        UnsupportedModelError: a class of its own, a forward of one instance or a hook, with the module's path.
    """
    for block in blocks:
        for module, path, replaced in _leaving(block, profile):
            if replaced and not type(module).__module__.startswith("transformers.models."):
                got = f"{type(module).__module__}.{type(module).__qualname__}"
                raise _changed("a class of its own", path, got)
            if "forward" in vars(module):
                raise _changed("a forward of its own", path)
            hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values()]
            if any(getattr(hook, "__module__", "") != _HARMLESS for hook in hooks):
                raise _changed("a hook", path)


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
