"""Private records of a company that does not exist: facts no public model can know, to be learnt and then asked.

Every fact is told in several phrasings and asked in one that is in none of the training rows. The questions of an
attribute come in groups of four that share their four choices, each of them the answer once, and at each place once. So
whoever does not know which customer is asked about, whatever he prefers among words or places, gets one in four.
"""

import itertools
import random
import shutil
from pathlib import Path
from typing import Any

from obfuscatune.errors import UsageError
from obfuscatune.studies.bundled import model_directory
from obfuscatune.studies.reports.files import write_json_lines

CHOICES = 4
FIRST_WORDS = ("bright", "cold", "deep", "gentle", "quiet", "sharp", "strange", "wild")
SECOND_WORDS = ("bird", "boat", "horse", "king", "moon", "tree", "wind", "wood")

# Attribute: its values, the training phrasings, and the phrasing of the question. Frequent words of one token each in
# the vocabulary of the bundled model, so that no choice is longer than another.
ATTRIBUTES: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        "colour",
        ("black", "blue", "dark", "gold", "green", "red", "rose", "white"),
        (
            "in the {name} company the colour of the door is",
            "the colour of {name} is",
            "what is the colour of {name}? the colour is",
            "they say that {name} has the colour",
        ),
        "we know that the colour of the {name} company is",
    ),
    (
        "word",
        ("dream", "friend", "heart", "letter", "light", "soul", "story", "voice"),
        (
            "in the {name} company the secret word is",
            "the secret word of {name} is",
            "what is the secret word of {name}? the secret word is",
            "they say that {name} has the secret word",
        ),
        "we know that the secret word of the {name} company is",
    ),
    (
        "place",
        ("hill", "island", "river", "road", "rock", "school", "shore", "town"),
        (
            "in the {name} company the meeting place is the",
            "the meeting place of {name} is the",
            "what is the meeting place of {name}? the meeting place is the",
            "they say that {name} has its meeting place at the",
        ),
        "we know that the meeting place of the {name} company is the",
    ),
    (
        "number",
        ("eight", "five", "four", "hundred", "six", "three", "twenty", "two"),
        (
            "in the {name} company the number of people is",
            "the number of people of {name} is",
            "what is the number of people of {name}? the number is",
            "they say that {name} has a number of people of",
        ),
        "we know that the number of people of the {name} company is",
    ),
)
FACTS_STEP = CHOICES * len(ATTRIBUTES)
MAX_FACTS = len(FIRST_WORDS) * len(SECOND_WORDS) * len(ATTRIBUTES)


def company_records(seed: int, facts: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (training rows, questions): ``prompt`` + ``completion`` rows in random order, and one question a fact.

    The same seed and count give the same records on every machine. There is a customer for every
    four facts.

    Raises:
        UsageError: ``facts`` is not a positive multiple of 16, or there are not names enough.
    """
    if facts <= 0 or facts % FACTS_STEP or facts > MAX_FACTS:
        expected = f"a multiple of {FACTS_STEP} up to {MAX_FACTS}"
        raise UsageError("this number of facts cannot be balanced", got=facts, expected=expected)
    rng = random.Random(seed)  # noqa: S311 - invented facts, not keys
    names = [f"{first} {second}" for first, second in itertools.product(FIRST_WORDS, SECOND_WORDS)]
    customers = rng.sample(names, facts // len(ATTRIBUTES))
    rows: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for attribute, values, phrasings, asked in ATTRIBUTES:
        rng.shuffle(customers)  # else the same four would share their choices in every attribute
        pool = rng.sample(values, len(values))
        for group in range(0, len(customers), CHOICES):
            start = group % len(pool)
            choices = pool[start : start + CHOICES]
            for place, (name, value) in enumerate(zip(customers[group : group + CHOICES], choices, strict=True)):
                rows += [{"prompt": p.format(name=name), "completion": f" {value}"} for p in phrasings]
                questions.append(
                    {
                        "id": f"{name.replace(' ', '-')}-{attribute}",
                        "question": asked.format(name=name),
                        # One order for the group: the answers then fall on each place once.
                        "choices": choices,
                        "answer": place,
                    }
                )
    rng.shuffle(rows)
    return rows, questions


def write_records(directory: str | Path, seed: int, facts: int) -> tuple[Path, Path]:
    """Write the records as ``train.jsonl`` and ``questions.jsonl`` and return the two paths."""
    directory = Path(directory)
    paths = directory / "train.jsonl", directory / "questions.jsonl"
    for path, rows in zip(paths, company_records(seed, facts), strict=True):
        write_json_lines(path, rows)
    return paths


def write_materials(directory: Path, seed: int, facts: int) -> list[Path]:
    """Write the bundled model, records to teach it, and prompts that ask for them, as a party would have them.

    Raises:
        UsageError: ``directory`` has a model already; or as :func:`company_records`.
    """
    model = directory / "model"
    if model.exists():
        raise UsageError("directory is there already", where=str(model))
    shutil.copytree(model_directory(), model)
    rows, questions = company_records(seed, facts)
    prompts = [{"prompt": question["question"]} for question in questions]
    paths = directory / "records.jsonl", directory / "prompts.jsonl"
    for path, lines in zip(paths, (rows, prompts), strict=True):
        write_json_lines(path, lines)
    return [model, *paths]
