"""Pieces of text: together what the tokenizer makes of all tokens, up to the first stop string."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

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
