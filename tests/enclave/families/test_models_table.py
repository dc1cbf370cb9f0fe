"""The table of families and profiles in docs/models.md is what the code does."""

import re
import warnings
from pathlib import Path

import pytest
from transformers import AutoConfig

from obfuscatune import PROFILES, UnsupportedModelError
from obfuscatune.enclave.families import FAMILIES, read_decoder
from obfuscatune.enclave.families.empty import empty_model
from obfuscatune.enclave.families.fit import fit
from obfuscatune.profiles import resolve

TEXT = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
ROWS = dict(re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", TEXT, re.MULTILINE))
REASONS = {"normalized in each head": "2", "norms stand after": "3", "layers differ in their masks": "1"}


def cell(model_type: str, profile: str) -> str:
    """``exact`` or ``refused``, with the numbers of the notes that say why."""
    decoder = read_decoder(empty_model(AutoConfig.for_model(model_type)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(decoder, PROFILES[profile])
        except UnsupportedModelError as error:
            notes = sorted(note for words, note in REASONS.items() if words in str(error) and note != "1")
            return f"refused ({', '.join(notes)})"
    notes = sorted(note for words, note in REASONS.items() if any(words in str(w.message) for w in caught))
    return f"exact ({', '.join(notes)})" if notes else "exact"


def test_attention_that_was_asked_for_on_the_worker_is_refused_where_it_cannot_be() -> None:
    decoder = read_decoder(empty_model(AutoConfig.for_model("qwen3")))
    with pytest.warns(UserWarning, match="so attention stays in the enclave"):
        assert fit(decoder, resolve("balanced", mlp="enclave")).attention == "enclave"
    with pytest.raises(UnsupportedModelError, match="attention cannot run on the worker"):
        fit(decoder, resolve("balanced", attention="worker"))
    with pytest.raises(UnsupportedModelError, match="attention cannot run on the worker"):
        fit(decoder, resolve(resolve("balanced", attention="worker"), mlp="enclave"))


def test_every_family_has_its_row() -> None:
    assert set(ROWS) - {"model_type"} == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_row_is_what_the_code_does(model_type: str) -> None:
    plain, linear, balanced, stream = (text.strip() for text in ROWS[model_type].split("|"))
    assert cell(model_type, "plain") == plain
    assert {cell(model_type, profile) for profile in ("paper", "naive", "strict", "shared")} == {linear}
    assert cell(model_type, "balanced") == balanced
    assert cell(model_type, "stream") == stream.replace(" (1)", "")
