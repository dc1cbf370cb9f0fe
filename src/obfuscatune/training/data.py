"""Private text for fine-tuning: JSONL rows in, token ids and labels out, bad rows refused with file and line.

The rows are the data owner's secret. A message about a bad row names types, keys and positions, never its content; that
is also why a decoding error is dropped before ours is raised: Python's own exceptions carry the text they failed on.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from obfuscatune.errors import DataError, UsageError
from obfuscatune.training.chat import as_messages, conversation_tokens, is_ended

IGNORED_LABEL = -100  # torch's cross entropy leaves these positions out
MAX_LINE_BYTES = 1_000_000
EXTRA_KEYS = frozenset({"id", "choices", "answer", "support", "meta"})
FORMATS = (frozenset({"text"}), frozenset({"prompt", "completion"}), frozenset({"messages"}))
FORMAT_NAMES = "text, prompt + completion, or messages"
ROLES = ("system", "user", "assistant")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 and so every tokenizer cannot


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


@dataclass(frozen=True)
class EncodingSummary:
    """What `encode_rows` did, in counts: rows, tokens, tokens with a loss, and rows that lost something.

    Args:
        shortened_prompts: rows cut on the left. truncated_completions: rows cut on the right.
        answers_without_end: conversations whose last answer ends without a token to stop at that carries a loss, and
            that something follows: the model may not learn to stop.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    shortened_prompts: int
    truncated_completions: int
    answers_without_end: int


def read_objects(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (``file:line``, object) for each line of a JSONL file that is not blank.

    Raises:
        UsageError: the file cannot be read.
        DataError: a line is longer than 1 MB, not UTF-8, not JSON or not an object, or there is none.
    """
    found = False
    for where, line in _lines(Path(path)):
        if not line.strip():
            continue
        row = _decode(line, where)
        if not isinstance(row, dict):
            raise DataError("row is not an object", got=type(row).__name__, expected="a JSON object", where=where)
        found = True
        yield where, row
    if not found:
        raise DataError("file has no rows", expected="one JSON object per line", where=f"{path}:1")


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(
            "cannot read the data file", got=error.strerror, where=str(path), hint="give the path of a JSONL file"
        ) from None
    with file:
        number = 0
        # The limit is given to readline, so that a file without line ends is never read whole.
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                expected = f"at most {MAX_LINE_BYTES:,} bytes"
                raise DataError("line is too long", expected=expected, where=where, hint="split it into several rows")
            yield where, line


def _decode(line: bytes, where: str) -> Any:
    try:
        text = line.rstrip().decode("utf-8")
    except UnicodeDecodeError as error:
        problem = DataError("line is not UTF-8", got=f"a bad byte at column {error.start + 1}", where=where)
    else:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            problem = DataError("line is not JSON", got=f"a syntax error at column {error.pos + 1}", where=where)
        except (ValueError, RecursionError) as error:
            problem = DataError("line is not JSON", got=f"a {type(error).__name__} in the decoder", where=where)
    raise problem  # here and not in the handlers: an exception raised there would hold the line as its context


def check_keys(row: dict[str, Any], wanted: frozenset[str], allowed: frozenset[str], where: str) -> None:
    """Refuse a row that lacks a wanted key or has one that is neither wanted nor allowed."""
    missing, unknown = sorted(wanted - row.keys()), sorted(row.keys() - wanted - allowed)
    if missing or unknown:
        got = "; ".join([f"no {name!r}" for name in missing] + [f"unknown key {name[:40]!r}" for name in unknown])
        expected = f"{' + '.join(sorted(wanted))}, and nothing else but {', '.join(sorted(allowed))}"
        raise DataError("row has the wrong keys", got=got, expected=expected, where=where)


def check_text(value: Any, name: str, where: str) -> str:
    """Return ``value`` if it is a string with something in it that can be encoded."""
    if not isinstance(value, str):
        raise DataError(f"{name!r} has the wrong type", got=type(value).__name__, expected="a string", where=where)
    if not value.strip():
        raise DataError(f"{name!r} is empty", expected="text", where=where)
    if _LONE_SURROGATE.search(value):
        raise DataError(f"{name!r} has half a surrogate pair", expected="Unicode text", where=where)
    return value


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
        got = ", ".join(repr(name[:40]) for name in sorted(row)) or "no keys"
        raise DataError(what, got=got, expected=FORMAT_NAMES, where=where, hint=hint)
    check_keys(row, formats[0], EXTRA_KEYS, where)
    if "messages" in row:
        return Row(messages=_answered(_messages(row["messages"], "messages", where), where), where=where)
    if "text" in row:
        return Row(completion=check_text(row["text"], "text", where), where=where)
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        asked, told = (_messages(row[name], name, where) for name in ("prompt", "completion"))
        return Row(messages=asked + _answered(told, where), where=where, context=len(asked))
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


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return ``[bos]`` for a tokenizer that opens every text with it (Llama), ``[]`` otherwise (GPT-2)."""
    return [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id][:1]


def pair_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt, as when it is completed, and those of its completion; none opens or ends a text.

    They are the tokens of the joint text, unless a token of it spans the border: the model that completes the prompt
    never meets such a token, and prompt and completion are tokenized apart.
    """
    first: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    joint: list[int] = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    if joint[: len(first)] == first:
        return first, joint[len(first) :]
    return first, tokenizer(completion, add_special_tokens=False)["input_ids"]


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], EncodingSummary]:
    """Turn rows into ``input_ids``, ``attention_mask`` and ``labels``; the loss is on completions or assistant turns.

    An end-of-text token with a loss closes each row that does not end with it, and each conversation whose template
    leaves the last answer open. A row longer than ``max_length`` loses the left of what precedes its last answer, the
    start token apart; an answer that is too long by itself is cut at its end.

    Raises:
        UsageError: no end-of-text token, no chat template for messages, or ``max_length`` leaves no room.
        DataError: a row whose messages the chat template refuses, or whose answers cannot be told apart.
    """
    start = start_tokens(tokenizer)
    if max_length < len(start) + 2:
        raise UsageError("max_length is too small", got=max_length, expected=f"at least {len(start) + 2}")
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end-of-text token", hint="set its eos_token")
    encoded, supervised, shortened, truncated, endless = [], 0, 0, 0, 0
    for row in rows:
        ids, learnt, ended = _learnt(row, tokenizer, start)
        kept = int(ids[0] == tokenizer.bos_token_id and not learnt[0])
        room = max_length - kept
        last = len(ids) - 1 - learnt[::-1].index(True)  # of the tokens with a loss; then back to where its answer opens
        while last > kept and learnt[last - 1]:
            last -= 1
        first = max(kept, min(len(ids) - room, last))
        shortened += first > kept
        truncated += len(ids) - first > room
        endless += not ended
        used = [*range(kept), *range(first, min(len(ids), first + room))]
        labels = [ids[i] if learnt[i] else IGNORED_LABEL for i in used]
        supervised += sum(label != IGNORED_LABEL for label in labels)
        encoded.append({"input_ids": [ids[i] for i in used], "attention_mask": [1] * len(used), "labels": labels})
    tokens = sum(len(row["input_ids"]) for row in encoded)
    return encoded, EncodingSummary(len(rows), tokens, supervised, shortened, truncated, endless)


def _learnt(row: Row, tokenizer: PreTrainedTokenizerBase, start: list[int]) -> tuple[list[int], list[bool], bool]:
    """Return a row's tokens, which of them carry a loss, and whether its last answer ends with a token to stop at."""
    if row.messages:
        ids, learnt = conversation_tokens(tokenizer, row.messages, row.context, row.where)
        close = len(learnt) - learnt[::-1].index(True)
        if is_ended(tokenizer, ids[:close]):
            return ids, learnt, True
        if close < len(ids):
            return ids, learnt, False  # something follows: an end-of-text token there would not be the template's
    else:
        prompt, completion = pair_tokens(tokenizer, row.prompt, row.completion)
        ids = start + prompt + completion
        learnt = [False] * (len(ids) - len(completion)) + [True] * len(completion)
    if ids[-1] != tokenizer.eos_token_id:
        ids, learnt = [*ids, tokenizer.eos_token_id], [*learnt, True]
    return ids, learnt, True


class Collator:
    """Pad encoded rows on the right to the longest of the batch: int64 tensors of shape [batch, length].

    Args:
        pad_token_id: fills ``input_ids``; labels get -100 and the attention mask 0.
        pad_to_multiple_of: rounds the length up, for kernels that like it.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self._fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL}
        self._multiple = pad_to_multiple_of

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return the padded ``input_ids``, ``attention_mask`` and ``labels``."""
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self._multiple) * self._multiple
        return {
            name: torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows], dtype=torch.int64)
            for name, fill in self._fill.items()
        }
