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
        completion: what is learnt; the whole of a ``text`` row; empty for a ``messages`` row.
        messages: (role, content) turns of a ``messages`` row, the last one the assistant's.
        where: ``file:line``.
    """

    prompt: str = field(default="", repr=False)
    completion: str = field(default="", repr=False)
    messages: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    where: str = ""


@dataclass(frozen=True)
class EncodingSummary:
    """What `encode_rows` did, in counts: rows, tokens, tokens with a loss, and rows cut on either side."""

    rows: int
    tokens: int
    supervised_tokens: int
    shortened_prompts: int
    truncated_completions: int


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
        return Row(messages=_messages(row["messages"], where), where=where)
    if "text" in row:
        return Row(completion=check_text(row["text"], "text", where), where=where)
    prompt, completion = (check_text(row[name], name, where) for name in ("prompt", "completion"))
    return Row(prompt=prompt, completion=completion, where=where)


def _messages(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError("'messages' has the wrong type", expected="a list of objects", where=where)
    turns = []
    for index, turn in enumerate(value):
        check_keys(turn, frozenset({"role", "content"}), frozenset(), f"{where}, message {index}")
        if turn["role"] not in ROLES:
            raise DataError("unknown role", expected=", ".join(ROLES), where=f"{where}, message {index}")
        turns.append((turn["role"], check_text(turn["content"], "content", f"{where}, message {index}")))
    if not turns or turns[-1][0] != "assistant":
        raise DataError("nothing to learn from", expected="a last message of the assistant", where=where)
    return tuple(turns)


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return ``[bos]`` for a tokenizer that opens every text with it (Llama), ``[]`` otherwise (GPT-2)."""
    return [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id][:1]


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], EncodingSummary]:
    """Turn rows into ``input_ids``, ``attention_mask`` and ``labels``; the loss is on completions or assistant turns.

    Prompt and completion are tokenized apart, so that the border is the same in training and in scoring: a space
    between them belongs to the completion. An end-of-text token closes each row, unless the chat template closes turns
    itself. A row longer than ``max_length`` loses the left of what precedes its last completion; a completion that is
    too long by itself is cut at its end.

    Raises:
        UsageError: no end-of-text token, or ``max_length`` leaves no room.
        DataError: the chat template rewrites earlier turns, so that the turns of the row cannot be told apart.
    """
    start = start_tokens(tokenizer)
    room = max_length - len(start)
    if room < 2:
        raise UsageError("max_length is too small", got=max_length, expected=f"at least {len(start) + 2}")
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end-of-text token", hint="set its eos_token")
    encoded, supervised, shortened, truncated = [], 0, 0, 0
    for row in rows:
        ids: list[int] = []
        labels: list[int] = []
        last = 0
        for text, learnt in _segments(row, tokenizer):
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            last = len(ids) if learnt else last
            ids += tokens
            labels += tokens if learnt else [IGNORED_LABEL] * len(tokens)
        if not (row.messages and tokenizer.chat_template):
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        first = min(max(0, len(ids) - room), last)
        shortened += first > 0
        truncated += len(ids) - first > room
        ids, labels = start + ids[first:][:room], [IGNORED_LABEL] * len(start) + labels[first:][:room]
        supervised += sum(label != IGNORED_LABEL for label in labels)
        encoded.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    tokens_seen = sum(len(row["input_ids"]) for row in encoded)
    return encoded, EncodingSummary(len(rows), tokens_seen, supervised, shortened, truncated)


def _segments(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Cut a row into (text, learnt) pieces, the last of them learnt."""
    if not row.messages:
        return [(row.prompt, False), (row.completion, True)]
    if not tokenizer.chat_template:
        pieces: list[tuple[str, bool]] = []
        for role, content in row.messages:
            pieces += [(f"{role}:", False), (f" {content}\n", role == "assistant")]
        return pieces
    turns = [{"role": role, "content": content} for role, content in row.messages]
    pieces, done = [], ""
    for index in (i for i, turn in enumerate(turns) if turn["role"] == "assistant"):
        asked = str(tokenizer.apply_chat_template(turns[:index], tokenize=False, add_generation_prompt=True))
        answered = str(tokenizer.apply_chat_template(turns[: index + 1], tokenize=False))
        if not asked.startswith(done) or not answered.startswith(asked):
            hint = "split the conversation into rows with one assistant turn each"
            raise DataError("the chat template rewrites earlier turns", where=row.where, hint=hint)
        pieces += [(asked[len(done) :], False), (answered[len(asked) :], True)]
        done = answered
    return pieces


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
