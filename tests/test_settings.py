"""Training settings from a job that somebody else wrote."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import FormatError
from obfuscatune.parties.canonical import encode
from obfuscatune.settings import TrainingSettings

NAMES = sorted(field.name for field in dataclasses.fields(TrainingSettings))
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
settings = st.builds(
    TrainingSettings,
    max_length=st.integers(2, 4096),
    learning_rate=st.floats(0, 10),
    num_train_epochs=st.floats(0, 1e6),
    max_steps=st.integers(-1, 1 << 31),
    lr_scheduler_type=st.sampled_from(["linear", "cosine"]),
    optim=st.sampled_from(["adamw", "sgd"]),
    lora_dropout=st.floats(0, 0.99),
    lora_target_modules=st.none() | st.lists(st.text(max_size=5), max_size=3),
    save_total_limit=st.none() | st.integers(1, 9),
)


@given(settings)
def test_round_trip_of_what_is_changed(given_settings: TrainingSettings) -> None:
    changed = given_settings.changed()
    assert TrainingSettings.from_dict(changed) == given_settings
    if "lora_target_modules" not in changed:
        assert TrainingSettings.from_dict(json.loads(encode(changed))) == given_settings


def test_defaults() -> None:
    assert TrainingSettings.from_dict({}) == TrainingSettings() and TrainingSettings().changed() == {}
    assert TrainingSettings.from_dict({"learning_rate": 1}).learning_rate == 1.0
    assert TrainingSettings(lora_target_modules=["a, b", "c"]).targets() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("max_length", 1, "below 2"),
        ("max_length", 512.0, "of type float"),
        ("max_length", True, "of type bool"),
        ("max_length", None, "missing"),
        ("learning_rate", -1e-9, "below 0"),
        ("learning_rate", float("nan"), "not finite"),
        ("learning_rate", float("inf"), "not finite"),
        ("learning_rate", 10**400, "of type int"),
        ("learning_rate", "1e-3", "of type str"),
        ("num_train_epochs", 1e300, "above"),
        ("seed", -1, "below 0"),
        ("seed", 2**32, "above"),
        ("lora_dropout", 1.0, "above 0.99"),
        ("lora_r", 0, "below 1"),
        ("optim", "adam", "not one of adamw, sgd"),
        ("optim", ["adamw"], "not one of"),
        ("lora_target_modules", "c_attn", "not a list"),
        ("lora_target_modules", [1], "not a list"),
        ("lora_target_modules", ["x"] * 65, "not a list"),
        ("output_dir", "/etc", "unknown 'output_dir'"),
        ("push_to_hub", True, "unknown 'push_to_hub'"),
    ],
)
def test_what_does_not_fit(name: str, value: Any, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        TrainingSettings.from_dict({name: value})


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(FormatError, match="unknown 'x'; lora_r is below 1; seed is of type str"):
        TrainingSettings.from_dict({"x": 1, "seed": "", "lora_r": 0})


@pytest.mark.parametrize("wrong", [None, [], "x", 1, {1: 2}, {1: 2, "seed": 3}])
def test_no_map(wrong: Any) -> None:
    with pytest.raises(FormatError, match="not a map"):
        TrainingSettings.from_dict(wrong)


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), values, max_size=4) | values)
def test_arbitrary_values(value: Any) -> None:
    try:
        found = TrainingSettings.from_dict(value)
    except FormatError:
        return
    assert TrainingSettings.from_dict(found.changed()) == found
