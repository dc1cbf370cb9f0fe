"""Conversations to tokens by the tokenizer's own chat template, and which of the tokens are the assistant's.

Where the template marks what the assistant says (``{% generation %}``), its marks are followed. Where it does not, the
same conversation is rendered up to each turn of the assistant, without and with it: what the second has more than the
first is the turn. This is exact only if both are a beginning of the whole conversation, token by token. Templates that
rewrite earlier turns (some drop the thoughts of all but the last) break this, and such a row is refused.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from obfuscatune.errors import DataError, UsageError
from obfuscatune.training.quiet import Quiet

Turns = Sequence[tuple[str, str]]  # (role, content)

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WORD = 3  # characters of a word that no header has by accident
_ONE_TURN = "give the tokenizer a template with {% generation %} marks, or write rows with one assistant turn each"


def as_messages(turns: Turns) -> list[dict[str, str]]:
    """Return the turns as templates and JSON files have them."""
    return [{"role": role, "content": content} for role, content in turns]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, turns: Turns, where: str) -> list[int]:
    """Return the tokens of ``turns`` and of the header that opens the assistant's answer.

    Secrecy: the turns are the data owner's; errors name roles and positions only.

    Raises:
        UsageError: the tokenizer has no chat template.
        DataError: the template refuses the turns, or leaves out what the last one says.
    """
    _template(tokenizer, where)
    tokens = _render(tokenizer, turns, where, add_generation_prompt=True)["input_ids"]
    _check_said(tokenizer, turns, [len(turns) - 1], where)  # a template may keep the last question alone
    return tokens


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UsageError where the chat template, if there is one, is no template of Jinja."""
    if not tokenizer.chat_template:
        return
    line = None
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        line = error.lineno
    except Exception:  # it may want other messages
        return
    if line is not None:
        raise UsageError("the chat template is not valid Jinja", where=f"line {line} of it")


def spells_special(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> int | None:
    """Return the first turn that spells a special token, or None.

    Only the template may write these: one in a turn could close it, and open another in somebody else's name.
    """
    special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)

    def spells(content: str) -> bool:
        # A tokenizer may look for a token in the normalized text: there a full-width letter is the usual one.
        normal = content if normalizer is None else normalizer.normalize_str(content)
        return any(
            token.content in content
            or (token.normalized and normalizer is not None and normalizer.normalize_str(token.content) in normal)
            for token in special
        )

    return next((n for n, (_, content) in enumerate(turns) if spells(content)), None)


def conversation_tokens(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, first: int, where: str
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and for each whether the assistant says it in turn ``first`` or later.

    ``first`` above 0 is the length of a prompt, and the prompt with the header of the answer has to be a beginning of
    the whole. Secrecy and errors: as :func:`prompt_tokens`.

    Raises:
        UsageError: the tokenizer has no chat template.
        DataError: the template refuses the turns or leaves out what is said, or the assistant's tokens cannot be told
            apart.
    """
    if _MARKS.search(_template(tokenizer, where)):
        rendered = _render(tokenizer, turns, where, return_assistant_tokens_mask=True)
        whole, learnt = rendered["input_ids"], [mask == 1 for mask in rendered["assistant_masks"]]
        if first:
            border = len(_beginning(tokenizer, turns, first, whole, where))
            learnt[:border] = [False] * border
    else:
        whole = _render(tokenizer, turns, where)["input_ids"]
        learnt = [False] * len(whole)
        for index in (i for i, (role, _) in enumerate(turns) if role == "assistant" and i >= first):
            start = len(_beginning(tokenizer, turns, index, whole, where))
            end = len(_closed(tokenizer, turns, index, whole, where))
            learnt[start:end] = [True] * (end - start)
    _check_said(tokenizer, turns, [i for i, (role, _) in enumerate(turns) if role != "system"], where)
    if not any(learnt):
        raise DataError("the chat template marks no token as the assistant's", where=where)
    return whole, learnt


def is_ended(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> bool:
    """Return whether an answer ends with a token to stop at: one added to the vocabulary, white space after it apart.

    This is also how TRL decides whether a template teaches the model to stop.
    """
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for token in reversed(tokens):
        if token in added or str(tokenizer.decode([token])).strip():
            return token in added
    return False


def _template(tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if not tokenizer.chat_template:
        hint = "put a chat_template.jinja beside the tokenizer, or write prompt + completion as texts"
        raise UsageError("messages, but the tokenizer has no chat template", where=where, hint=hint)
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        pass  # several templates by name, and none of them is the default
    raise UsageError("the tokenizer has several chat templates", expected="one of them named default", where=where)


def _check_said(tokenizer: PreTrainedTokenizerBase, turns: Turns, indices: Iterable[int], where: str) -> None:
    """Refuse a template that leaves out all words of a turn: the run would learn, or answer, headers alone.

    Those of models that take pictures do so, where they want a list of parts and make nothing of a text.
    """
    with Quiet("the chat template fails on the messages", where=where):
        whole: Any = tokenizer.apply_chat_template(as_messages(turns), tokenize=False, add_generation_prompt=False)
    text = str(whole).casefold()
    for index in indices:
        content = turns[index][1].casefold()
        # Templates cut thoughts and white space off, and quote. A short word may be in a header too.
        words = [word for word in content.split() if len(word) >= _WORD] or content.split()
        if not any(word in text for word in words):
            raise DataError(
                "the chat template leaves out what a message says",
                got=f"no word of the {turns[index][0]}'s",
                where=f"{where}, message {index}",
                hint="is it of a model that takes pictures? give the tokenizer a template that takes texts as contents",
            )


def _render(tokenizer: PreTrainedTokenizerBase, turns: Turns, where: str, **more: Any) -> dict[str, list[int]]:
    what = "the chat template refuses the messages"
    roles = ", ".join(role for role, _ in turns[:8]) + (", ..." if len(turns) > 8 else "")
    hint = "many templates want user and assistant in turn, and some take no system message"
    # A template is a program: it raises by itself, with the turns in its message, and its operations raise anything.
    with Quiet(what, where=where, got=roles, hint=hint):
        rendered: Any = tokenizer.apply_chat_template(as_messages(turns), tokenize=True, return_dict=True, **more)
    return {name: list(rendered[name]) for name in ("input_ids", "assistant_masks") if name in rendered}


def _beginning(tokenizer: PreTrainedTokenizerBase, turns: Turns, index: int, whole: list[int], where: str) -> list[int]:
    """What is before the words of turn ``index``, its header included."""
    if index == 0:
        raise DataError("the assistant speaks first", expected="a user or system message before it", where=where)
    tokens = _render(tokenizer, turns[:index], where, add_generation_prompt=True)["input_ids"]
    if whole[: len(tokens)] != tokens:
        raise DataError(
            "the chat template rewrites what is before an answer, or joins it with the answer in one token",
            where=f"{where}, message {index}",
            hint=f"remove white space at the start of the answer; {_ONE_TURN}",
        )
    return tokens


def _closed(tokenizer: PreTrainedTokenizerBase, turns: Turns, index: int, whole: list[int], where: str) -> list[int]:
    """All up to the end of turn ``index``."""
    tokens = whole if index == len(turns) - 1 else _render(tokenizer, turns[: index + 1], where)["input_ids"]
    if whole[: len(tokens)] != tokens and tokens[-1] == tokenizer.eos_token_id:
        tokens = tokens[:-1]  # some templates close the conversation, and not the turn, with it
    if whole[: len(tokens)] != tokens:
        raise DataError("the chat template rewrites earlier turns", where=f"{where}, message {index}", hint=_ONE_TURN)
    return tokens
