"""Pieces of text: together what the tokenizer makes of all tokens, up to the first stop string."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from obfuscatune.serving.text import Text


@given(
    text=st.text(alphabet="abé漢🦓 \n", max_size=30),
    noise=st.lists(st.integers(0, 255), max_size=6),
    stops=st.lists(st.text(alphabet="ab漢 ", min_size=1, max_size=4), max_size=4),
)
def test_pieces_are_the_text_up_to_the_first_stop(
    tokenizer: Any, text: str, noise: list[int], stops: list[str]
) -> None:
    tokens = [*noise, *tokenizer(text)["input_ids"]] if text else noise
    shown, pieces = Text(tokenizer, stops), []
    for token in tokens:
        pieces.append(shown.push(token))
        if shown.stopped:
            break
    pieces.append(shown.end())
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    places = [place for place in map(whole.find, stops) if place >= 0]
    assert "".join(pieces) == shown.text == (whole[: min(places)] if places else whole)


def test_what_may_begin_a_stop_string_is_held_back(tokenizer: Any) -> None:
    shown = Text(tokenizer, ["END"])
    pieces = [shown.push(token) for token in tokenizer("an E, ENTRY, END of")["input_ids"]]
    assert pieces[:6] == ["a", "n", " ", "", "E,", " "]
    assert "".join(pieces) == "an E, ENTRY, "


WORDS = ("▁", "x", "▁x", "▁hello")
FIRST_WORD = 259  # after three special tokens and the bytes


@pytest.fixture(scope="module")
def of_bytes() -> PreTrainedTokenizerFast:
    """With a token for each byte, and the decoder of Llama 2, Mistral, Gemma and Phi-3."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {name: number for number, name in enumerate(names)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>")


def shown_of(tokenizer: Any, tokens: list[int]) -> str:
    text = Text(tokenizer)
    pieces = [*(text.push(token) for token in tokens), text.end()]
    assert "".join(pieces) == text.text
    return text.text


@given(st.lists(st.one_of(st.sampled_from(["😀", "é", "\n"]), st.integers(0, len(WORDS) - 1)), max_size=12))
def test_whole_characters_of_bytes(of_bytes: Any, parts: list[str | int]) -> None:
    tokens = [
        token
        for part in parts
        for token in ([FIRST_WORD + part] if isinstance(part, int) else [3 + byte for byte in part.encode()])
    ]
    assert shown_of(of_bytes, tokens) == of_bytes.decode(tokens, skip_special_tokens=True)


@given(st.lists(st.integers(0, FIRST_WORD + len(WORDS) - 1), max_size=12))
def test_bytes_that_are_no_text_end_no_completion(of_bytes: Any, tokens: list[int]) -> None:
    """What is no broken character is at least what the decoder leaves of all tokens at once, and in its order."""
    shown, whole = iter(shown_of(of_bytes, tokens)), of_bytes.decode(tokens, skip_special_tokens=True)
    assert all(letter in shown for letter in whole.replace("\ufffd", ""))


def test_a_character_that_was_whole_stays_whole_before_a_broken_one(of_bytes: Any) -> None:
    x = FIRST_WORD + WORDS.index("▁x")
    face, broken = [3 + byte for byte in "😀".encode()], [3 + byte for byte in "😁".encode()[:2]]
    assert shown_of(of_bytes, [x, *face, *broken, x]) == "x😀\ufffd\ufffd x"
    assert shown_of(of_bytes, [x, *face, *broken]) == "x😀\ufffd\ufffd"
    assert of_bytes.decode([x, *face, *broken]) == "x" + 6 * "\ufffd"  # of the decoder all at once
