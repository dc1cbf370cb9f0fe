"""Hooks, and forwards set on an instance: code that is lost where a module is not called any more."""

import inspect
import sys
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks that transformers leaves after the first call that asked for hidden states or attention weights. They do nothing
# unless these are asked for again, which `protect` refuses where they are on the worker.
_HARMLESS = "transformers.utils.output_capturing"


def own_code(module: nn.Module) -> str | None:
    """Return what a module has that its class has not, in words; None where there is nothing."""
    if "forward" in module.__dict__:
        return "a forward of its own"
    return "a hook" if has_hooks(module) else None


# Whose decorators wrap each other's functions.
_LIBRARIES = frozenset({"torch", "transformers", "peft", "accelerate", "kernels"})


def set_on_class(kind: type[nn.Module]) -> str | None:
    """Return where the forward of a class is from, if another package has put it there; None where it is its own."""
    home = next(each for each in kind.__mro__ if "forward" in each.__dict__)
    return _foreign(home.__dict__["forward"], home.__module__)


def replaced_function(kind: type[nn.Module]) -> tuple[str, str] | None:
    """Return the name of a function that the forward of a class calls, and where it is from, if that was replaced.

    Looks at functions of the class's module by their global names, at methods, and at those that they call in turn.
    """
    home = next(each for each in kind.__mro__ if "forward" in each.__dict__)
    seen: set[Any] = set()
    left = [inspect.unwrap(home.__dict__["forward"])]
    while left:
        function = left.pop()
        if function in seen or not isinstance(function, FunctionType):
            continue
        seen.add(function)
        names = function.__code__.co_names  # of what it reads: global names, attributes of whatever it has
        found = [(n, f) for n in names for f in (function.__globals__.get(n), inspect.getattr_static(kind, n, None))]
        for name, called in found:
            if not isinstance(called, FunctionType):
                continue
            source = _foreign(called, home.__module__)
            if source is not None and source.split(".")[0] not in sys.stdlib_module_names:
                return name, source
            if called.__module__ == home.__module__:
                left.append(inspect.unwrap(called))
    return None


def _foreign(function: Any, home: str) -> str | None:
    """The module that a function was written in, if that is of another package than ``home`` and the libraries."""
    # Not its __module__, which `functools.wraps` copies.
    source = str(getattr(function, "__globals__", {}).get("__name__", repr(function)))
    return None if source.split(".")[0] in {*_LIBRARIES, home.split(".")[0]} else source


def has_hooks(module: nn.Module, *, after: bool = False) -> bool:
    """Whether anybody's hook is on a module; ``after``: one that sees or changes what comes out of it."""
    own = module.__dict__  # a decode step looks at some hundred modules: no loop, no lookup by nn.Module
    if not (
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    ):  # nearly always
        return False
    kinds = [kind for kind in _KINDS if not (after and kind == "_forward_pre_hooks")]
    hooks = [hook for kind in kinds for hook in getattr(module, kind).values()]
    return any(getattr(hook, "__module__", "") != _HARMLESS for hook in hooks)


def forget_adapters_of_rows(model: nn.Module, _: object, output: object) -> None:
    """A forward hook that is called always: take PEFT's hooks of ``adapter_names`` off after a call that failed.

    PEFT takes them off only after one that did not, and each later call would be refused for them.
    """
    if output is not None:
        return
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, partial) and "adapter_names" in hook.keywords:
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


def has_hooks_on_all() -> bool:
    """Whether anybody's hook is on every module of the process."""
    named = vars(torch_module)  # torch has no public way to ask
    return any(named.get(f"_global{kind}") for kind in _KINDS)
