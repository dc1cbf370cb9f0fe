"""Presets: what options change in them, and what they refuse."""

import pytest

from obfuscatune.errors import UsageError
from obfuscatune.studies.reproduce.presets import METHODS, PRESETS, RECORDS, choose
from obfuscatune.studies.tasks.catalogue import TASKS


def test_the_paper_preset_has_the_paper_s_settings() -> None:
    preset = choose("paper")
    training = preset.training_of("sciq", 2)
    assert (training.num_train_epochs, training.learning_rate, training.per_device_train_batch_size) == (10, 3e-5, 1)
    assert (training.lora_r, training.lora_alpha, training.lora_dropout, training.seed) == (16, 32, 0.05, 2)
    assert tuple(preset.models) == ("small", "medium", "large", "xl")
    assert (preset.grids[0].tasks, preset.grids[0].methods) == (tuple(TASKS), METHODS)
    assert (preset.train_rows, preset.eval_items) == (None, None)


def test_options_replace_the_preset_s_own() -> None:
    assert choose("small") == PRESETS["small"]
    chosen = choose("small", tasks=("sciq",), methods=("unprotected", "balanced+mlp=enclave"), seeds=(7,))
    [grid] = chosen.grids
    assert (grid.tasks, grid.dtypes, chosen.seeds) == (("sciq",), ("float32",), (7,))
    assert len(choose("small", seeds=(7,)).grids) == len(PRESETS["small"].grids)
    assert choose("paper", sizes=("medium",)).models == {"medium": "gpt2-medium"}
    assert choose("small", models=("../models/mini/",)).models == {"mini": "../models/mini/"}
    off = choose("paper", no_dropout=True)
    assert off.no_dropout and off.training.lora_dropout == 0
    assert choose("small").training_of(RECORDS, 0).learning_rate != choose("small").training_of("sciq", 0).learning_rate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ("huge",)}, "unknown size"),
        ({"tasks": ("hellaswag",)}, "unknown task"),
        ({"dtypes": ("float16",)}, "unknown dtype"),
        ({"methods": ("strong",)}, "unknown profile"),
        ({"methods": ("paper+speed=9",)}, "unknown profile switch"),
        ({"models": ("x",), "sizes": ("small",)}, "sizes are of the preset's own models"),
    ],
)
def test_unknown_names_are_refused(options: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose("paper", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown preset"):
        choose("large")
