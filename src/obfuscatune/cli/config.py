"""``--config x.yaml``: options from a file, by the names they have on the command line, refused with file and line."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from obfuscatune.errors import UsageError

_OCTAL = re.compile(r"[-+]?0[0-7_]+")


def load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the command's options; the callback of ``--config``.

    Raises:
        UsageError: the file cannot be read or is no YAML map, or has unknown, repeated or unfit values, all in one
            message.
    """
    if path is None:
        return None
    options: dict[str, Any] = {p.name: p for p in context.command.params if p.name not in (None, "config", "help")}
    values: dict[str, Any] = {}
    faults: list[str] = []
    seen: set[str] = set()
    for name, value, line in _read(path):
        if name in options:
            value = _settle(context, options[name], value)
        if name in options and options[name].multiple and isinstance(value, str):
            value = [value]  # one of what may be several
        fault = f"{name!r} is there twice" if name in seen else _fault(context, options, name, value)
        seen.add(name)
        if fault:
            faults.append(f"line {line}: {fault}")
        elif value is not None:
            values[name] = value
    if faults:
        hint = f"{context.command_path} --help lists the names"
        raise UsageError("options in a config file", got="; ".join(faults), where=str(path), hint=hint)
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _read(path: Path) -> list[tuple[str, Any, int]]:
    """Return (key, value, line) of each entry of a YAML map."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows write a mark at the start
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise UsageError("config file is no map", expected="lines of 'name: value'", where=f"{path}:1")
        loader = yaml.SafeLoader("")
        pairs = [] if root is None else root.value
        return [(_name(key), _value(loader, value), key.start_mark.line + 1) for key, value in pairs]
    except OSError as error:
        raise UsageError("cannot read the config file", got=error.strerror, where=str(path)) from None
    except UnicodeDecodeError:
        raise UsageError("config file is not UTF-8", where=str(path)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        problem = getattr(error, "problem", None) or "a syntax error"
        raise UsageError("config file is not YAML", got=problem, where=f"{path}:{line}") from None


@dataclass(frozen=True)
class _Misread:
    """A word or number that YAML reads as something else than it says. ``text``: as it is written."""

    text: str
    read_as: str


@dataclass(frozen=True)
class _Number:
    """A number that Python writes in another way than the file: the same to an option for numbers, and to no other."""

    text: str
    value: int | float


def _settle(context: typer.Context, option: Any, value: Any) -> Any:
    """Return a value as an option takes it that is, or is not, for numbers: a version 1.10 is not 1.1."""
    if isinstance(value, list):
        return [_settle(context, option, item) for item in value]
    if not isinstance(value, _Number):
        return value
    number, several = value.value, option.multiple
    try:
        made = option.process_value(context, [number] if several else number)
    except typer.BadParameter:
        return number  # what is wrong with it is told in the option's own words
    made = made[0] if several else made
    return number if isinstance(made, int | float) else _Misread(value.text, str(number))


def _name(key: Any) -> str:
    """Return a key as it is written; a list or map for a key has no name."""
    return key.value if isinstance(key.value, str) else "a list or map"


def _value(loader: Any, node: Any) -> Any:
    """Return a node's value; a word for a boolean, and a number or date with colons or dashes, stay what they are."""
    value = loader.construct_object(node, deep=True)
    if isinstance(value, list):
        return [_value(loader, item) for item in node.value]
    written = node.value if isinstance(node.value, str) else ""
    if isinstance(value, bool):
        return value if written.lower() in ("true", "false") else _Misread(written, str(value).lower())
    if not isinstance(value, str | list | dict | int | float | None) or (
        isinstance(value, int | float) and (":" in written or _OCTAL.fullmatch(written))
    ):
        return _Misread(written, str(value))
    if isinstance(value, int | float) and str(value) != written:
        return _Number(written, value)
    return value


def _fault(context: typer.Context, options: dict[str, Any], name: str, value: Any) -> str:
    """What is wrong with one entry, in words, or nothing."""
    if name not in options:
        close = difflib.get_close_matches(name, options, n=1)
        return f"unknown option {name!r}" + (f", did you mean {close[0]!r}?" if close else "")
    if isinstance(value, dict):
        return f"{name!r} is a map"
    items = value if isinstance(value, list) else [value]
    if misread := next((item for item in items if isinstance(item, _Misread)), None):
        return f"{name!r}: YAML reads {misread.text} as {misread.read_as}; write that, or put quotes around it"
    if isinstance(value, bool) and not getattr(options[name], "is_flag", False):
        return f"{name!r} is {str(value).lower()}, and no option that is on or off"
    if value is None:
        return ""
    if options[name].multiple != isinstance(value, list):
        return f"{name!r} is {'not a list' if options[name].multiple else 'a list'}"
    if isinstance(value, list) and any(item is None or isinstance(item, bool | list | dict) for item in value):
        return f"{name!r} is a list with something else than words and numbers in it"
    try:
        options[name].process_value(context, value)
    except typer.BadParameter as error:
        return f"{name!r}: {error.message}"
    return ""
