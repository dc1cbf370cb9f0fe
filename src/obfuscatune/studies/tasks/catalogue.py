"""The paper's four tasks over local JSONL: rows in, the columns that the harness' own templates read out.

Prompts, choices and metrics are the harness' alone: its packaged configuration of a task is kept, and only where the
documents come from is replaced. The documents stay in memory, because ``datasets`` would leave a copy of private rows
in its cache. `write_configs` is how the harness learns of it, by its own ``--include_path``.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from obfuscatune.errors import DataError, UsageError
from obfuscatune.training.jsonl import check_keys, check_text, read_objects

Document = dict[str, Any]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SPLITS_FILE = "brmson_subsplits_of_train.json"  # of WebQuestions: {id: split} over its train rows
TRAINING_SPLIT = "trainmodel"  # the one of them that is learnt from; all others are held out


@dataclass(frozen=True)
class Task:
    """How one task's rows become documents of the harness.

    Args:
        folder: of its JSONL files, below the data directory.
        columns: the names in the harness' data set, from a checked row's question, choices (or answers) and the rest.
        choices: fewest and most choices; None where the row has ``answers``, all of them right.
    """

    folder: str
    columns: Callable[[str, list[str], int, str], Document]
    choices: tuple[int, int] | None


def _sciq(question: str, choices: list[str], answer: int, support: str) -> Document:
    # The harness puts the right answer last, whatever its place in the row was.
    wrong = [choice for index, choice in enumerate(choices) if index != answer]
    distractors = {f"distractor{number}": text for number, text in enumerate(wrong, 1)}
    return {"question": question, **distractors, "correct_answer": choices[answer], "support": support}


def _piqa(question: str, choices: list[str], answer: int, support: str) -> Document:
    return {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": answer}


def _openbookqa(question: str, choices: list[str], answer: int, support: str) -> Document:
    options = {"text": choices, "label": list(LETTERS[: len(choices)])}
    return {"question_stem": question, "choices": options, "answerKey": LETTERS[answer]}


def _webqs(question: str, choices: list[str], answer: int, support: str) -> Document:
    return {"question": question, "answers": choices}


TASKS: Mapping[str, Task] = {
    "webqs": Task("webqs", _webqs, None),
    "openbookqa": Task("obqa", _openbookqa, (2, len(LETTERS))),
    "piqa": Task("piqa", _piqa, (2, 2)),
    "sciq": Task("sciq", _sciq, (4, 4)),
}


def check_tasks(names: Sequence[str]) -> list[str]:
    """Return the names, each once. Raises UsageError for one that is not of the four."""
    for name in names:
        if name not in TASKS:
            raise UsageError("unknown task", got=repr(name), expected=f"one of {', '.join(TASKS)}")
    return list(dict.fromkeys(names))


def check_data(names: Sequence[str], data_dir: str | Path | None, count: int) -> None:
    """Refuse, before a model is loaded, local rows that are not there, and prompts with more examples than there are.

    Raises:
        UsageError: no rows of a task; too few for ``count`` examples in a prompt; or webqs, whose several right answers
            the harness cannot write there. DataError: a bad row.
    """
    if count and "webqs" in names:
        raise UsageError("webqs has no few-shot prompt in the harness", got=f"num_fewshot={count}", expected="0")
    if data_dir is None:
        return
    if not Path(data_dir).is_dir():
        raise UsageError("no such data directory", where=f"--data_dir {data_dir}")
    for name in names:
        found = len(read_splits(name, data_dir).training)
        # Of a task without a test split the harness draws one more, in case that it draws the question itself.
        needed = count and count + (name == "piqa")
        if found < needed:
            got, expected = f"{found} training rows of {name}", f"at least {needed}"
            hint = "train.jsonl, or a smaller num_fewshot"
            raise UsageError(
                "too few examples for the prompt", got=got, expected=expected, where=str(data_dir), hint=hint
            )


def require_harness() -> None:
    """Raise UsageError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "lm-evaluation-harness is not installed", hint="pip install '.[eval]' in the source of obfuscatune"
        )


@dataclass(frozen=True)
class Splits:
    """Documents to learn from and documents to be asked, with no id in both."""

    training: list[Document]
    held_out: list[Document]


def read_splits(task: str, data_dir: str | Path) -> Splits:
    """Read ``data_dir/FOLDER/train.jsonl`` and what is held out: ``test.jsonl``, or else ``validation.jsonl``.

    WebQuestions with a train file only is split by ``brmson_subsplits_of_train.json``. A missing train file is no
    training documents. Each document has its row's ``id`` beside the harness' columns.

    Raises:
        UsageError: no such folder, nothing held out. DataError: a bad row; an id twice, or on both sides.
    """
    directory = Path(data_dir) / TASKS[task].folder
    train, splits = directory / "train.jsonl", directory / SPLITS_FILE
    given = [path for path in (directory / "test.jsonl", directory / "validation.jsonl") if path.is_file()]
    training = _read(task, train) if train.is_file() else {}
    if given:
        held_out = _read(task, given[0])
    elif training and splits.is_file():
        split_of = _read_split_names(splits, training)
        held_out = {key: document for key, document in training.items() if split_of[key] != TRAINING_SPLIT}
        training = {key: document for key, document in training.items() if key not in held_out}
    else:
        expected = f"test.jsonl or validation.jsonl, or {SPLITS_FILE} beside train.jsonl"
        raise UsageError(f"no held-out rows of task {task}", expected=expected, where=str(directory), hint="--data_dir")
    if both := training.keys() & held_out.keys():
        got = f"{len(both)} ids in both"
        raise DataError("rows to learn from are also held out", got=got, expected="disjoint ids", where=str(directory))
    return Splits(list(training.values()), list(held_out.values()))


def local_dataset(local_task: str, local_dir: str, **_: Any) -> Any:
    """Return the ``datasets.DatasetDict`` of a task, in memory; the harness' ``custom_dataset``.

    ``validation`` and ``test`` are both what is held out: the harness evaluates on ``test`` where a task names it.
    The arguments are in `write_configs`; the harness adds the model's own, which are not of interest here.
    """
    from datasets import Dataset, DatasetDict

    splits = read_splits(local_task, local_dir)
    held_out = Dataset.from_list(splits.held_out)
    return DatasetDict(train=Dataset.from_list(splits.training), validation=held_out, test=held_out)


@contextmanager
def write_configs(tasks: Sequence[str], data_dir: str | Path) -> Iterator[Path]:
    """Give a temporary directory of task configurations for ``--include_path``, over local rows; it holds no row.

    Each includes the configuration that the harness ships and replaces its data set alone.
    """
    require_harness()
    if not Path(data_dir).is_dir():
        raise UsageError("no such data directory", where=f"--data_dir {data_dir}")
    packaged = packaged_configs()
    with TemporaryDirectory(prefix="obfuscatune-tasks-") as name:
        for task in tasks:
            own = {"local_task": task, "local_dir": str(Path(data_dir).absolute())}
            lines = [
                f"include: {json.dumps(str(packaged[task]))}",
                f"task: {task}",
                "tag: []",  # the harness' own lists of tasks stay as they are
                f"dataset_kwargs: {json.dumps(own)}",
                f"custom_dataset: !function {__name__}.{local_dataset.__name__}",
            ]
            (Path(name) / f"{task}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield Path(name)


def packaged_configs() -> dict[str, Path]:
    """Return the harness' own configuration file of each task."""
    spec = importlib.util.find_spec("lm_eval")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return {task: Path(folders[0]) / "tasks" / task / f"{task}.yaml" for task in TASKS}


def _read(task: str, path: Path) -> dict[str, Document]:
    documents: dict[str, Document] = {}
    for where, row in read_objects(path):
        key, document = _document(TASKS[task], row, where)
        if key in documents:
            raise DataError("id twice in a file", expected="an id of its own for each row", where=where)
        documents[key] = document
    return documents


def _document(task: Task, row: dict[str, Any], where: str) -> tuple[str, Document]:
    texts = "answers" if task.choices is None else "choices"
    wanted = {"id", "question", texts} | ({"answer"} if task.choices else set())
    check_keys(row, frozenset(wanted), frozenset({"support", "meta"}), where)
    key, question = (check_text(row[name], name, where) for name in ("id", "question"))
    choices, answer, support = row[texts], row.get("answer", 0), row.get("support", "")
    fewest, most = task.choices or (1, 1000)
    if not isinstance(choices, list) or not fewest <= len(choices) <= most:
        got = f"{len(choices)} items" if isinstance(choices, list) else type(choices).__name__
        expected = f"a list of {fewest}" if fewest == most else f"a list of {fewest} to {most}"
        raise DataError(f"{texts!r} does not fit the task", got=got, expected=expected, where=where)
    for choice in choices:
        check_text(choice, texts, where)
    if type(answer) is not int or not 0 <= answer < len(choices):  # a bool is an int to isinstance
        expected = f"an index from 0 to {len(choices) - 1}"
        raise DataError("'answer' names no choice", got=type(answer).__name__, expected=expected, where=where)
    if not isinstance(support, str):
        raise DataError("'support' has the wrong type", got=type(support).__name__, expected="a string", where=where)
    return key, {"id": key, **task.columns(question, choices, answer, support)}


def _read_split_names(path: Path, training: dict[str, Document]) -> dict[str, str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("cannot read the splits", got=type(error).__name__, where=str(path)) from None
    if not isinstance(names, dict):
        raise DataError(
            "the splits are not an object", got=type(names).__name__, expected="{id: split}", where=str(path)
        )
    missing = training.keys() - names.keys()
    if missing:
        raise DataError("rows are in no split", got=f"{len(missing)} of {len(training)}", where=str(path))
    return names
