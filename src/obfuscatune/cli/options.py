"""Options as dataclasses: declared once, with the names that transformers, TRL and PEFT use, shared between verbs.

A field made by :func:`option` is one option, ``--field_name``; :func:`takes` turns a function of such a record into a
function that typer can read. The switches of a profile are derived from the profile's own record.
"""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import dataclasses
import inspect
import os.path
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from obfuscatune.cli.config import load_config
from obfuscatune.profiles import PROFILES, SWITCHES, Profile, resolve

T = TypeVar("T")

_MOST = 1e9  # of a float whose option names no ceiling: what sleeps, counts or divides by it takes no infinity
_METAVARS = {bool: " ", int: "N", float: "X", Path: "PATH"}

# Of a help's last lines: a paragraph for each profile, in the words of its record.
CLAIMS = "What each profile claims against the operator of the worker:\n\n" + "".join(
    f"{profile.name}: {profile.claim}\n\n" for profile in PROFILES.values()
)
PROTECTION = "Protection"
WORKER_FORMS = "spawn, unix://PATH, tls://HOST:PORT#FINGERPRINT or tcp://HOST:PORT"
INSECURE_HELP = "allow tcp:// beyond this machine, which anyone on the path can read and change"
SWITCH_PANEL = "Switches of the profile (each can be set alone)"
_SWITCH_HELP = {
    "keys": "key family of the streams of width d",
    "inner_keys": "key family of what crosses inside attention and MLP, where these run in the enclave",
    "attention": "side that runs softmax and keeps the KV cache",
    "mlp": "side that runs the MLP's activation function",
    "head_keys": "a key for each head, with attention on the worker",
    "permute_mlp": "secret order of the MLP's neurons, with the MLP on the worker",
    "fold_norms": "fold norms into weights, so that the worker's rows have one norm",
    "lora_placement": "where the adapter and its optimizer are",
    "enclave_blocks": "the first N blocks stay in the enclave",
    "key_block": "block size of Monarch keys",
    "kappa": "condition number of conditioned keys",
    "head_kappa": "condition number of each head's key",
    "mix_rows": "mix the rows of each call with noise rows",
    "mix_tile": "most columns that one secret matrix mixes",
    "verify": "check each product of the worker with secret vectors",
    "weights": "how workers hold weights: keyed, as secret shares, or in the clear",
    "primes": "primes of secret shares, more for more precision; 0: by the model's dtype",
    "threshold": "how many workers with shares may collude",
    "spares": "how many workers with shares may fail",
    "rotate_stream": "all blocks in one call, under one rotation of the residual stream",
}


def option(text: str, default: Any = MISSING, **more: Any) -> Any:
    """Declare one option of a record; without a default it is required.

    Args:
        text: one line of help. default: its value where it is not given.
        more: further arguments of ``typer.Option``; ``flag`` replaces the option's spelling.
    """
    return field(default=default, metadata={"help": text, **more})


def argument(text: str, default: Any = MISSING, **more: Any) -> Any:
    """Declare one argument of a record that is given by its place; as :func:`option` otherwise."""
    return field(default=default, metadata={"help": text, "positional": True, **more})


def expand_home(name: str | None) -> str | None:
    """Expand a leading ``~``, which no shell does in a config file; the callback of options that name a directory."""
    return None if name is None else os.path.expanduser(name)


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """A file of options."""

    config: Path | None = option(
        "YAML file of options by these names; the command line wins", None, callback=load_config, is_eager=True
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, in which dtype."""

    model_name_or_path: str = option("directory, or name on the hub, of a causal language model", callback=expand_home)
    dtype: typing.Literal["float32", "float64", "bfloat16"] = option("dtype of its weights", "float32")


@dataclass(frozen=True, kw_only=True)
class ProtectionOptions:
    """What the worker may see, and who it is."""

    profile: str = option(f"one of {', '.join(PROFILES)}", "balanced", rich_help_panel=PROTECTION)
    worker: list[str] | None = option(
        f"{WORKER_FORMS}; repeated, the workers share the blocks", None, rich_help_panel=PROTECTION
    )
    identity: Path | None = option(
        "your NAME.key, for a worker at tls:// or for a job's enclave", None, rich_help_panel=PROTECTION
    )
    insecure: bool = option(INSECURE_HELP, False, flag="--insecure", rich_help_panel=PROTECTION)
    device: str | None = option("device of a spawned worker", None, rich_help_panel=PROTECTION)
    threads: int | None = option(
        "CPU threads of a spawned worker", None, min=1, ceiling=4096, rich_help_panel=PROTECTION
    )
    timeout: float = option(
        "seconds to wait for each reply of the worker", 600.0, min=1e-3, ceiling=1e6, rich_help_panel=PROTECTION
    )
    switches: dict[str, Any] = field(default_factory=dict)

    def protection(self) -> dict[str, Any]:
        """Return the arguments of ``obfuscatune.protect``: the switches resolved, workers checked, identity read.

        Warns and raises as `resolve`, `check_workers` and `Identity.load`: before a model is read.
        """
        from obfuscatune.enclave.spawn import check_workers

        profile, workers = resolve(self.profile, **self.switches), list(self.worker or ["spawn"])
        given = {name: getattr(self, name) for name in ("device", "threads", "identity", "insecure")}
        if profile.remote:
            given["identity"] = check_workers(workers, **given)
        return {"profile": profile, "worker": workers, "timeout": self.timeout, **given}


def takes(record: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Make a function of one record of options readable for typer: a parameter for each field."""

    def decorate(function: Callable[[T], None]) -> Callable[..., None]:
        parameters = list(_parameters(record))

        def command(**values: Any) -> None:
            if any(f.name == "switches" for f in dataclasses.fields(record)):  # type: ignore[arg-type]
                values["switches"] = {name: values.pop(name) for name in SWITCHES}
            try:
                function(record(**values))
            except EOFError as error:  # a library's, of a file that ends too early; click would take it for Ctrl-D
                raise RuntimeError("a file has ended") from error

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__doc__ = function.__doc__
        return command

    return decorate


def _parameters(record: Any) -> Iterator[inspect.Parameter]:
    hints = typing.get_type_hints(record)
    for declared in dataclasses.fields(record):
        if declared.name == "switches":
            yield from _switches()
            continue
        more = dict(declared.metadata)
        spelling = more.pop("flag", f"--{declared.name}")
        default = inspect.Parameter.empty if declared.default is MISSING else declared.default
        yield _parameter(declared.name, hints[declared.name], default, spelling, **more)


def _switches() -> Iterator[inspect.Parameter]:
    hints = typing.get_type_hints(Profile)
    for name in SWITCHES:
        spelling = f"--{name}/--no_{name}" if hints[name] is bool else f"--{name}"
        more = {"help": _SWITCH_HELP.get(name), "rich_help_panel": SWITCH_PANEL, "show_default": False}
        yield _parameter(name, hints[name] | None, None, spelling, **more)


def _parameter(name: str, hint: Any, default: Any, spelling: str, **more: Any) -> inspect.Parameter:
    kinds = [hint, *typing.get_args(hint)]
    choices = [
        choice for kind in kinds if typing.get_origin(kind) is typing.Literal for choice in typing.get_args(kind)
    ]
    if choices:
        more["help"] = f"{more['help']}: {', '.join(choices)}"
    if more.pop("positional", False):
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, typer.Argument(**more)]
        )
    if "ceiling" in more or float in kinds:
        more.setdefault("callback", _at_most(more.pop("ceiling", _MOST)))
    # Short ones: typer's own leave no room for the names, which it would cut at 80 columns.
    metavar = "NAME" if choices else next((short for kind, short in _METAVARS.items() if kind in kinds), "TEXT")
    annotation = Annotated[hint, typer.Option(spelling, metavar=metavar, **more)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _at_most(ceiling: float) -> Callable[[Any], Any]:
    """A callback that refuses larger values, and NaN, which typer's own least value lets through in some versions.

    typer's own range would take the room of the option's name in the help.
    """

    def check(value: Any) -> Any:
        if value is not None and not value <= ceiling:
            raise typer.BadParameter(f"{value} is above {ceiling:g}" if value > ceiling else f"{value} is no number")
        return value

    return check
