"""Modules that stand in the model's tree and are not called: what is done to them would be lost without a word."""

from collections.abc import Iterable, Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from obfuscatune.enclave.hooks import own_code
from obfuscatune.errors import UnsupportedModelError


class Standing:
    """Some children of a module with all that is below them, as they are now.

    PEFT's layers are left out: what PEFT does to them has a meaning, and slots heed it.
    """

    def __init__(self, parent: nn.Module, names: Iterable[str], path: str) -> None:
        self._found = [entry for name in names for entry in _from(parent, name, path)]
        self._dropouts = [(m, m.p, where) for _, _, m, where in self._found if isinstance(m, nn.Dropout)]

    def require(self) -> None:
        """Raise UnsupportedModelError where one was replaced or removed, or has got a hook or forward of its own.

        So it is where a dropout that was off, or that `protect` has warned of, is to drop something now.
        """
        for parent, name, module, path in self._found:
            if parent._modules.get(name) is not module:
                raise _lost("something else in its place", path)
            if (own := own_code(module)) is not None:
                raise _lost(own, path)
        for dropout, p, path in self._dropouts:
            if dropout.p != p and dropout.p > 0 and dropout.training:
                raise _lost(f"another dropout than when it was protected ({dropout.p:g})", path)


def _from(parent: nn.Module, name: str, path: str) -> Iterator[tuple[nn.Module, str, nn.Module, str]]:
    module = parent.get_submodule(name)
    if isinstance(module, BaseTunerLayer):
        return
    yield parent, name, module, f"{path}.{name}"
    for child, _ in module.named_children():
        yield from _from(module, child, f"{path}.{name}")


def _lost(what: str, path: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"a module that the worker stands for has {what}, which would be lost",
        where=path,
        hint="change the model before it is protected; strict and paper run changed code between linear layers",
    )
