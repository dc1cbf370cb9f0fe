import json
from collections import Counter
from pathlib import Path

import pytest

from obfuscatune.errors import UsageError
from obfuscatune.studies.bundled.records import MAX_FACTS, company_records, write_records
from obfuscatune.training.data import read_rows
from obfuscatune.training.scoring import read_questions


@pytest.mark.parametrize("facts", [16, 32, 64, MAX_FACTS])
def test_each_fact_is_told_in_four_ways_and_asked_in_another(facts: int) -> None:
    rows, questions = company_records(0, facts)
    told = {row["prompt"]: row["completion"] for row in rows}
    assert len(told) == len(rows) == 4 * facts
    assert len({q["id"] for q in questions}) == len({q["question"] for q in questions}) == len(questions) == facts
    assert not told.keys() & {q["question"] for q in questions}
    for question in questions:
        name, word = question["id"].rsplit("-", 1)
        phrased = [p for p in told if name.replace("-", " ") in p and word in p]
        assert len(phrased) == 4
        assert {told[p] for p in phrased} == {" " + question["choices"][question["answer"]]}


@pytest.mark.parametrize("facts", [16, 48, 64, MAX_FACTS])
def test_who_does_not_know_the_customer_gets_one_in_four(facts: int) -> None:
    _, questions = company_records(0, facts)
    assert all(len(set(q["choices"])) == 4 for q in questions)
    assert set(Counter(q["answer"] for q in questions).values()) == {facts // 4}
    # Whatever is preferred among given choices in a given order: it is right as often as each of the other three.
    right = Counter((tuple(q["choices"]), q["answer"]) for q in questions)
    for choices in {key[0] for key in right}:
        assert len({right[choices, place] for place in range(4)}) == 1


def test_the_records_depend_on_the_seed_alone() -> None:
    assert company_records(1, 32) == company_records(1, 32)
    assert company_records(1, 32) != company_records(2, 32)


@pytest.mark.parametrize("facts", [-16, 0, 8, 17, MAX_FACTS + 16])
def test_a_number_of_facts_that_cannot_be_balanced_is_refused(facts: int) -> None:
    with pytest.raises(UsageError, match="balanced"):
        company_records(0, facts)


def test_the_files_hold_the_records_in_the_format_of_the_data_module(tmp_path: Path) -> None:
    train, asked = write_records(tmp_path / "new", 3, 32)
    rows, questions = company_records(3, 32)
    assert [(r.prompt, r.completion) for r in read_rows(train)] == [(r["prompt"], r["completion"]) for r in rows]
    assert [list(q.choices) for q in read_questions(asked)] == [q["choices"] for q in questions]
    assert json.loads(asked.read_text().splitlines()[0]) == questions[0]
