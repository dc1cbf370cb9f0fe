"""Sizes of the accuracy study: from the paper's own down to a minute."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from obfuscatune.errors import UsageError
from obfuscatune.settings import TrainingSettings
from obfuscatune.studies.bench.run import parse_profile
from obfuscatune.studies.tasks.catalogue import TASKS

UNPROTECTED = "unprotected"
RECORDS = "records"  # the package's invented records, asked as SciQ rows; no data directory
BUNDLED = "bundled"
# The ablation with its optimizer in plain coordinates: what is left is what the precision costs.
NAIVE_INSIDE = "naive+lora_placement=enclave"
METHODS = (UNPROTECTED, "naive", "paper", "balanced")
_WITH_SHARED = (*METHODS, "shared")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Trials of every combination. ``methods``: `UNPROTECTED`, or profiles as reports write them."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...] = METHODS
    dtypes: tuple[str, ...] = ("float32",)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How much is trained and asked.

    Args:
        models: name in tables to directory, hub name or `BUNDLED`. grids: combinations, duplicates once.
        training: settings but for the seed; ``task_training``: what a task changes in them.
        train_rows, eval_items: of each task, all where None; ``task_items``: other numbers of items.
        no_dropout: the models' own dropout is off. threads: of each process, the machine's default where None.
    """

    models: Mapping[str, str]
    grids: tuple[Grid, ...]
    seeds: tuple[int, ...]
    training: TrainingSettings
    task_training: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    train_rows: int | None = None
    eval_items: int | None = None
    task_items: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    eval_batch_size: int = 16
    no_dropout: bool = True
    threads: int | None = 1

    def training_of(self, task: str, seed: int) -> TrainingSettings:
        """Return the settings of one trial."""
        return replace(self.training, seed=seed, **self.task_training.get(task, {}))


# Short rows, each fact told in four ways: the one task here that a small model learns, from chance to every item.
_RECORDS = {"learning_rate": 3e-3, "per_device_train_batch_size": 16, "num_train_epochs": 30.0, "max_length": 64}
_SMALL = TrainingSettings(
    max_length=128, learning_rate=1e-3, per_device_train_batch_size=8, num_train_epochs=2.0, logging_steps=1
)

PRESETS: Mapping[str, Preset] = {
    "paper": Preset(
        models={"small": "gpt2", "medium": "gpt2-medium", "large": "gpt2-large", "xl": "gpt2-xl"},
        grids=(Grid(tasks=tuple(TASKS)),),
        seeds=(0, 1, 2),
        # Appendix A of the paper; what it does not name is the Trainer's default.
        training=TrainingSettings(
            max_length=1024,
            learning_rate=3e-5,
            per_device_train_batch_size=1,
            num_train_epochs=10.0,
            lora_r=16,
            lora_alpha=32,
            lora_dropout=0.05,
            logging_steps=100,
        ),
        no_dropout=False,
        threads=None,
    ),
    "small": Preset(
        models={BUNDLED: BUNDLED},
        grids=(
            Grid(tasks=(*TASKS, RECORDS), methods=_WITH_SHARED),
            Grid(tasks=("openbookqa", RECORDS), dtypes=("bfloat16",)),
            Grid(tasks=(RECORDS,), methods=(NAIVE_INSIDE,), dtypes=DTYPES),
        ),
        seeds=(0, 1, 2),
        training=_SMALL,
        task_training={RECORDS: _RECORDS},
        train_rows=256,
        eval_items=200,
        task_items={"webqs": 50, "sciq": 100},  # the first is hopeless at this size, the second has long prompts
    ),
    "tiny": Preset(
        models={BUNDLED: BUNDLED},
        grids=(Grid(tasks=(RECORDS,)),),
        seeds=(0,),
        training=_SMALL,
        task_training={RECORDS: {**_RECORDS, "num_train_epochs": 2.0}},
        train_rows=64,
        eval_items=16,
    ),
}


def choose(
    preset: str,
    *,
    models: tuple[str, ...] = (),
    sizes: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    methods: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    no_dropout: bool = False,
) -> Preset:
    """Return the preset with what is given instead of its own; all of it is checked.

    Tasks, methods or dtypes make one grid of the preset's first: what the preset measures beside it is left out.

    Args:
        models: directories or hub names, instead of the preset's. sizes: names of some of the preset's models.

    Raises:
        UsageError: an unknown name.
    """
    if preset not in PRESETS:
        raise UsageError("unknown preset", got=repr(preset), expected=f"one of {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    _check("size", sizes, tuple(chosen.models))
    _check("task", tasks, (*TASKS, RECORDS))
    _check("dtype", dtypes, DTYPES)
    for method in methods:
        if method != UNPROTECTED:
            parse_profile(method)
    if models and sizes:
        raise UsageError("sizes are of the preset's own models", got="--sizes with --model_name_or_path")
    given = {"tasks": tasks, "methods": methods, "dtypes": dtypes}
    if any(given.values()):
        chosen = replace(
            chosen, grids=(replace(chosen.grids[0], **{name: values for name, values in given.items() if values}),)
        )
    if models:
        chosen = replace(chosen, models={_label(name): name for name in models})
    elif sizes:
        chosen = replace(chosen, models={name: chosen.models[name] for name in sizes})
    if no_dropout:
        chosen = replace(chosen, no_dropout=True, training=replace(chosen.training, lora_dropout=0.0))
    return replace(chosen, seeds=seeds or chosen.seeds)


def _check(what: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"unknown {what}", got=repr(name), expected=f"one of {', '.join(known)}")


def _label(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]
