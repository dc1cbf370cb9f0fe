"""Rows to tokens and labels: what carries the loss, how a row ends, what a row that is too long loses."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from obfuscatune.errors import DataError, UsageError
from obfuscatune.training.chat import conversation_tokens, is_ended
from obfuscatune.training.data import Row
from obfuscatune.training.quiet import Quiet

IGNORED_LABEL = -100  # torch's cross entropy leaves these positions out
# Texts behind which a completion is tokenized: no token spans a line end and a word, as a rule, and where a tokenizer
# makes nothing of line ends, or joins them with what follows, there are others.
_BEFORE = ("\n", ":", "a")


@dataclass(frozen=True)
class EncodingSummary:
    """What `encode_rows` did, in counts: rows, tokens, tokens with a loss, and rows that lost something.

    Args:
        shortened_prompts: rows cut on the left. dropped_prompts: of these, rows of which nothing is left before the
            last answer. truncated_completions: rows cut on the right.
        answers_without_end: conversations whose last answer ends without a token to stop at that carries a loss, and
            that something follows: the model may not learn to stop.
        special_tokens_in_texts: how often a text spells a special token of the tokenizer, which becomes that token: an
            end of text in the middle of a row is one for the model too. The end of a completion may be spelled.
        changed_borders: rows whose tokens are not the text of prompt and completion, because a token would span both.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    shortened_prompts: int
    dropped_prompts: int
    truncated_completions: int
    answers_without_end: int
    special_tokens_in_texts: int
    changed_borders: int

    def warnings(self) -> list[str]:
        """Say in plain words what the model will not learn as the rows' owner may think."""
        found = []
        if self.answers_without_end:
            found.append("the chat template ends answers with no token that is learnt: the model may not learn to stop")
        if self.dropped_prompts:
            found.append(
                f"{self.dropped_prompts:,} rows have lost all of their prompt, because the answer alone fills "
                "max_length: the model learns these answers to no question. A larger --max_length keeps it"
            )
        if self.special_tokens_in_texts:
            found.append(
                f"the texts spell special tokens of the tokenizer, {self.special_tokens_in_texts:,} times: they are "
                "learnt as these tokens, not as text"
            )
        if self.changed_borders:
            found.append(
                f"in {self.changed_borders:,} rows the tokenizer changes the text between prompt and completion, by a "
                "space, say: let prompts end with a word, and completions begin with the space after it"
            )
        return found


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before every text: ``[bos]`` for Llama, ``[]`` for GPT-2."""
    whole: list[int] = tokenizer("a")["input_ids"]
    text: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    return next((whole[:at] for at in range(len(whole)) if text and whole[at : at + len(text)] == text), [])


def prompt_text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text to be completed, as in training: its start, and not the end that some add to it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return start_tokens(tokenizer) + ids


def pair_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[int], bool]:
    """Return the tokens of a prompt, as when it is completed, those of its completion, and whether both are the text.

    None opens or ends a text. They are the tokens of the joint text, unless a token of it spans the border: the model
    that completes the prompt never meets such a token, and prompt and completion are tokenized apart. Where the
    tokenizer would put a space before the completion then (Llama 2), it gets its tokens from behind another text.
    """

    def tokens(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    first, joint, alone = tokens(prompt), tokens(prompt + completion), tokens(completion)
    if joint[: len(first)] == first:
        return first, joint[len(first) :], True
    whole = text(joint)
    if text(first + alone) == whole:
        return first, alone, True
    for before in _BEFORE:
        opened, both = tokens(before), tokens(before + completion)
        rest = both[len(opened) :]
        if rest and both[: len(opened)] == opened and text(first + rest) == whole:
            return first, rest, True
    return first, alone, False


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, *, vocabulary: int | None = None
) -> tuple[list[dict[str, list[int]]], EncodingSummary]:
    """Turn rows into ``input_ids``, ``attention_mask`` and ``labels``; the loss is on completions or assistant turns.

    An end-of-text token with a loss closes each row that does not end with it, and each conversation whose template
    leaves the last answer open. A row longer than ``max_length`` loses the left of what precedes its last answer, the
    start token apart; an answer that is too long by itself is cut at its end.

    Args:
        vocabulary: rows of the model's embedding, see `vocabulary_of`; not looked at where None.

    Raises:
        UsageError: no end-of-text token, no chat template for messages, or ``max_length`` leaves no room.
        DataError: a row whose messages the chat template refuses, or whose answers cannot be told apart; one of which
            the tokenizer makes nothing, or mostly the token for what it does not know; one with a token that the model
            has no embedding of.
    """
    start = start_tokens(tokenizer)
    if max_length < len(start) + 2:
        raise UsageError("max_length is too small", got=max_length, expected=f"at least {len(start) + 2}")
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end-of-text token", hint="set its eos_token")
    encoded, supervised, shortened, dropped, truncated, endless, changed = [], 0, 0, 0, 0, 0, 0
    special = _special(tokenizer)
    for row in rows:
        ids, learnt, ended, same = _learnt(row, tokenizer, start)
        check_embedded(ids, vocabulary, row.where)
        opening = start or [tokenizer.bos_token_id]  # a chat template may begin with it where texts do not
        kept = len(opening) if ids[: len(opening)] == opening and not any(learnt[: len(opening)]) else 0
        room = max_length - kept
        last = len(ids) - 1 - learnt[::-1].index(True)  # of the tokens with a loss; then back to where its answer opens
        while last > kept and learnt[last - 1]:
            last -= 1
        first = max(kept, min(len(ids) - room, last))
        shortened += first > kept
        dropped += first == last > kept
        truncated += len(ids) - first > room
        endless += not ended
        changed += not same
        used = [*range(kept), *range(first, min(len(ids), first + room))]
        labels = [ids[i] if learnt[i] else IGNORED_LABEL for i in used]
        supervised += sum(label != IGNORED_LABEL for label in labels)
        encoded.append({"input_ids": [ids[i] for i in used], "attention_mask": [1] * len(used), "labels": labels})
    tokens = sum(len(row["input_ids"]) for row in encoded)
    spelled = sum(len(special.findall(text)) for row in rows for text in _texts(row, tokenizer)) if special else 0
    return encoded, EncodingSummary(
        len(rows), tokens, supervised, shortened, dropped, truncated, endless, spelled, changed
    )


def check_known(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], where: str) -> None:
    """Refuse the tokens of a text, its start apart, of which the tokenizer does not know the half.

    Raises:
        DataError: no token, or mostly the one for what is unknown.
    """
    unknown = tokenizer.unk_token_id
    count = 0 if unknown in (None, tokenizer.eos_token_id) else sum(token == unknown for token in tokens)
    if not tokens or 2 * count > len(tokens):
        got = f"{count} unknown of {len(tokens)} tokens"
        hint = "is it the model's tokenizer, and are all of its files there"
        raise DataError("the tokenizer does not know the text", got=got, where=where, hint=hint)


def vocabulary_of(config: Any) -> int:
    """Return the number of tokens that a model has an embedding of, by its configuration."""
    return int(config.get_text_config().vocab_size)


def positions_of(config: Any) -> int | None:
    """Return the number of positions that a model has, by its configuration; None where it has no bound, or says none.

    Of recurrent models the field may be missing or null.
    """
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions


def check_embedded(tokens: Sequence[int], vocabulary: int | None, where: str) -> None:
    """Refuse a token beyond the embedding: a special one of pictures or sounds, which a text spells.

    Raises:
        DataError: there is one. It names the token's number, which the tokenizer's owner chose.
    """
    if vocabulary is not None and (largest := max(tokens, default=0)) >= vocabulary:
        raise DataError(
            "the text spells a special token that the model has no embedding of",
            got=f"token {largest}",
            expected=f"below {vocabulary}",
            where=where,
            hint="tokenizers have such tokens for pictures and sounds; leave it out, or write it otherwise",
        )


def _special(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What finds the special tokens of a tokenizer in a text."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def _texts(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A row's texts, without an end of text that closes it."""
    end = str(tokenizer.eos_token or "")
    return [row.prompt, row.completion.removesuffix(end), *(content for _, content in row.messages)]


def _learnt(row: Row, tokenizer: PreTrainedTokenizerBase, start: list[int]) -> tuple[list[int], list[bool], bool, bool]:
    """Return a row's tokens, and which of them carry a loss.

    And whether its last answer ends with a token to stop at, and whether the tokens are the row's text.
    """
    same = True
    if row.messages:
        ids, learnt = conversation_tokens(tokenizer, row.messages, row.context, row.where)
        check_known(tokenizer, [token for token, mask in zip(ids, learnt, strict=True) if mask], row.where)
        close = len(learnt) - learnt[::-1].index(True)
        if is_ended(tokenizer, ids[:close]):
            return ids, learnt, True, same
        if close < len(ids):
            return ids, learnt, False, same  # something follows: an end-of-text token there would not be the template's
    else:
        with Quiet("the tokenizer fails on the row", where=row.where):
            prompt, completion, same = pair_tokens(tokenizer, row.prompt, row.completion)
        check_known(tokenizer, completion, row.where)
        ids = start + prompt + completion
        learnt = [False] * (len(ids) - len(completion)) + [True] * len(completion)
    if ids[-1] != tokenizer.eos_token_id:
        ids, learnt = [*ids, tokenizer.eos_token_id], [*learnt, True]
    return ids, learnt, True, same


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
