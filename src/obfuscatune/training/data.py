"""Private text to learn from or to complete: the formats of rows, read from JSONL, bad ones refused by file and line.

The rows are the data owner's secret, see `jsonl.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from obfuscatune.errors import DataError
from obfuscatune.training.chat import as_messages
from obfuscatune.training.jsonl import check_keys, check_text, read_objects, told

EXTRA_KEYS = frozenset({"id", "choices", "answer", "support", "meta"})
FORMATS = (frozenset({"text"}), frozenset({"prompt", "completion"}), frozenset({"messages"}))
FORMAT_NAMES = "text, prompt + completion, or messages"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """One training row; its texts stay out of ``repr``.

    Args:
        prompt: context without loss; empty for a ``text`` row.
        completion: what is learnt; the whole of a ``text`` row; empty for a conversation.
        messages: (role, content) turns of a conversation; the assistant's are learnt.
        where: ``file:line``.
        context: so many turns at the start are a prompt, without loss.
    """

    prompt: str = field(default="", repr=False)
    completion: str = field(default="", repr=False)
    messages: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    where: str = ""
    context: int = 0


Prompt = str | tuple[tuple[str, str], ...]  # a text to go on with, or (role, content) turns to answer


def read_rows(path: str | Path) -> list[Row]:
    """Read training rows: ``{"text"}``, ``{"prompt", "completion"}`` or ``{"messages": [{"role", "content"}, ...]}``.

    Prompt and completion are both texts, or both lists of messages.

    Secrecy: the rows are the data owner's and never leave the enclave.

    Raises:
        UsageError: the file cannot be read.
        DataError: a row is not in exactly one of the formats, or has an unknown key, a wrong type or an empty text.
    """
    return [_row(row, where) for where, row in read_objects(path)]


def _row(row: dict[str, Any], where: str) -> Row:
    formats = [keys for keys in FORMATS if keys & row.keys()]
    if len(formats) != 1:
        what = "row is in several formats" if formats else "row is in no known format"
        hint = "keep one of them" if formats else "rename the keys"
        got = told(sorted(row), row) or "no keys"
        raise DataError(what, got=got, expected=FORMAT_NAMES, where=where, hint=hint)
    check_keys(row, formats[0], EXTRA_KEYS, where)
    if "messages" in row:
        return Row(messages=_answered(_messages(row["messages"], "messages", where), where), where=where)
    if "text" in row:
        return Row(completion=check_text(row["text"], "text", where), where=where)
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        asked, answered = (_messages(row[name], name, where) for name in ("prompt", "completion"))
        return Row(messages=asked + _answered(answered, where), where=where, context=len(asked))
    prompt, completion = (check_text(row[name], name, where) for name in ("prompt", "completion"))
    return Row(prompt=prompt, completion=completion, where=where)


def _messages(value: Any, name: str, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"{name!r} has the wrong type", expected="a list of objects", where=where)
    if not value:
        raise DataError(f"{name!r} is empty", expected="messages", where=where)
    turns = []
    for index, turn in enumerate(value):
        check_keys(turn, frozenset({"role", "content"}), frozenset(), f"{where}, message {index}")
        if turn["role"] not in ROLES:
            raise DataError("unknown role", expected=", ".join(ROLES), where=f"{where}, message {index}")
        turns.append((turn["role"], check_text(turn["content"], "content", f"{where}, message {index}")))
    return tuple(turns)


def _answered(turns: tuple[tuple[str, str], ...], where: str) -> tuple[tuple[str, str], ...]:
    if all(role != "assistant" for role, _ in turns):
        raise DataError("nothing to learn from", expected="a message of the assistant", where=where)
    return turns


def read_prompts(path: str | Path) -> list[tuple[str, Prompt]]:
    """Read (``file:line``, prompt) of rows to complete: ``{"prompt": text or messages}`` or ``{"messages"}``.

    Training rows of the formats with a prompt may be used as they are: their ``completion`` is not read. The last of
    the messages is not the assistant's, for it is to be answered.

    Raises:
        UsageError: the file cannot be read. DataError: a row is anything else.
    """
    return [(where, _prompt(row, where)) for where, row in read_objects(path)]


def _prompt(row: dict[str, Any], where: str) -> Prompt:
    name = "messages" if "messages" in row else "prompt"
    check_keys(row, frozenset({name}), EXTRA_KEYS | ({"completion"} if name == "prompt" else frozenset()), where)
    if name == "prompt" and not isinstance(row[name], list):
        return check_text(row[name], name, where)
    turns = _messages(row[name], name, where)
    if turns[-1][0] == "assistant":
        hint = "leave out the last message, which generate writes"
        raise DataError("nothing to answer", expected="a last message of the user", where=where, hint=hint)
    return turns


def completed_row(prompt: Prompt, completion: str) -> dict[str, Any]:
    """Return a prompt and its completion as a row that :func:`read_rows` reads."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": completion}
    return {"prompt": as_messages(prompt), "completion": as_messages([("assistant", completion)])}
