"""Which workers a job gets: those that it names, by identity, out of those that the operator offers."""

from typing import Any

import pytest

from obfuscatune.errors import ConsentError, UsageError
from obfuscatune.parties.job import Job
from obfuscatune.parties.vocabulary import Worker
from obfuscatune.service.placement import Workers

from .jobs import job_fields

A, B, C = (f"{digit}{digit}" * 32 for digit in "abc")
OFFERED = [f"tls://{name}.example:7000#{fingerprint}" for name, fingerprint in (("a", A), ("b", B), ("c", C))]


def job(profile: str, *fingerprints: str) -> Job:
    named = tuple(Worker(fingerprint, f"operator of {fingerprint[:2]}") for fingerprint in fingerprints)
    return Job(**job_fields(profile=profile, switches={}, workers=named))


def test_a_job_gets_the_workers_that_it_names_in_its_order() -> None:
    workers = Workers.parse(["spawn", *OFFERED])
    assert workers.of(job("shared", C, A, B)) == [OFFERED[2], OFFERED[0], OFFERED[1]]
    assert workers.of(job("balanced", B)) == [OFFERED[1]]
    assert workers.of(job("balanced")) == ["spawn", *OFFERED]  # the choice is the operator's


@pytest.mark.parametrize("offered", [["spawn"], ["unix://w.sock"], ["tcp://127.0.0.1:7000"], OFFERED[1:]])
def test_a_worker_that_proves_no_identity_or_another_is_none_that_a_job_names(offered: list[str]) -> None:
    with pytest.raises(ConsentError, match=f"none {A[:16]} of operator of aa"):
        Workers.parse(offered).of(job("balanced", A))


@pytest.mark.parametrize(
    ("addresses", "text"),
    [
        ([], "number of workers"),
        (["tls://a.example:7000"], "no fingerprint"),
        (["a.example"], "not an address"),
        (["tcp://a.example:7000"], "neither encrypted nor authenticated"),
        ([OFFERED[0], f"tls://other.example:7000#{A}"], "given twice"),
    ],
)
def test_the_operators_mistakes_are_told_before_anything_is_served(addresses: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Workers.parse(addresses)
    assert Workers.parse(["tcp://a.example:7000"], insecure=True).by_identity == {}
