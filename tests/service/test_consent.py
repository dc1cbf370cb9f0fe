"""Consent: both signatures, this enclave, not over, each input from its owner and within its owner's terms."""

import time
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.errors import ConsentError, FormatError
from obfuscatune.parties.job import Job
from obfuscatune.parties.sealed.archive import seal_files
from obfuscatune.parties.sealed.fields import Header
from obfuscatune.parties.sealed.header import read_header
from obfuscatune.profiles import PROFILES
from obfuscatune.service.consent import OWNERS, check_input, check_job, check_query

from .jobs import CLINIC, LAB, STRANGER, job_fields, sign, terms_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NOW = time.time()
HERE = "ee" * 32


def seal(directory: Path, kind: Any, sender: Any, terms: Any = "all") -> tuple[str, Header]:
    files: dict[str, Any] = {"x": b"x"}
    terms = terms_of() if terms == "all" else terms
    path = directory / f"{time.monotonic_ns()}"
    digest = seal_files(path, files, kind=kind, sender=sender, recipients=[LAB.public], terms=terms, chunk_bytes=4096)
    return digest, read_header(path).header


def test_a_job_signed_by_both_is_taken() -> None:
    check_job(sign(Job(**job_fields())), enclaves=frozenset({HERE}), now=NOW)


@pytest.mark.parametrize(("signer", "missing"), [(LAB, "owner"), (CLINIC, "provider")])
def test_a_job_that_one_did_not_sign(signer: Any, missing: str) -> None:
    with pytest.raises(ConsentError, match=f"no signature of the {missing}"):
        check_job(sign(Job(**job_fields()), signer), enclaves=frozenset({HERE}), now=NOW)


def test_a_job_for_another_enclave_and_one_that_is_over() -> None:
    signed = sign(Job(**job_fields()))
    with pytest.raises(ConsentError, match="another enclave"):
        check_job(signed, enclaves=frozenset({"ef" * 32}), now=NOW)
    check_job(signed, enclaves=frozenset({HERE}), now=signed.job.expires - 1)
    with pytest.raises(ConsentError, match="expired"):
        check_job(signed, enclaves=frozenset({HERE}), now=signed.job.expires)


@pytest.mark.parametrize(("party", "role"), [(LAB, "provider"), (CLINIC, "owner")])
def test_a_job_of_an_identity_that_has_ended(party: Any, role: str) -> None:
    signed = sign(Job(**job_fields()))
    check_job(signed, enclaves=frozenset({HERE}), now=NOW, ended=frozenset({STRANGER.public.fingerprint}))
    with pytest.raises(ConsentError, match=f"identity of the {role} has ended"):
        check_job(signed, enclaves=frozenset({HERE}), now=NOW, ended=frozenset({party.public.fingerprint}))


@pytest.mark.parametrize("kind", sorted(OWNERS))
def test_an_input_is_its_owners(tmp_path: Path, kind: str) -> None:
    maker, other = (LAB, CLINIC) if kind == "model" else (CLINIC, LAB)
    digest, header = seal(tmp_path, kind, maker)
    check_input(sign(Job(**job_fields(**{kind: digest}, switches={}))), kind, digest, header, now=NOW)
    for wrong in (other, STRANGER):
        digest, header = seal(tmp_path, kind, wrong)
        with pytest.raises(ConsentError, match=f"{kind} was not sealed by the job's {OWNERS[kind]}"):
            check_input(sign(Job(**job_fields(**{kind: digest}))), kind, digest, header, now=NOW)


@pytest.mark.parametrize("kind", sorted(OWNERS))
def test_an_input_of_another_kind_or_digest(tmp_path: Path, kind: str) -> None:
    other = "data" if kind == "prompts" else "prompts"
    digest, header = seal(tmp_path, other, LAB if kind == "model" else CLINIC)
    with pytest.raises(ConsentError, match=f"not the {kind} of the job"):
        check_input(sign(Job(**job_fields(**{kind: digest}))), kind, digest, header, now=NOW)
    digest, header = seal(tmp_path, kind, LAB if kind == "model" else CLINIC)
    with pytest.raises(ConsentError, match=f"not the {kind} of the job"):
        check_input(sign(Job(**job_fields())), kind, digest, header, now=NOW)


@pytest.mark.parametrize("kind", sorted(OWNERS))
@pytest.mark.parametrize(
    ("terms", "asked", "text"),
    [
        (terms_of("enclave"), {"profile": "balanced"}, "profile balanced"),
        (terms_of("balanced"), {"switches": {"attention": "enclave"}}, r"profile balanced\+attention=enclave"),
        (terms_of(adapter_to=["provider"]), {"adapter_to": ("provider", "owner")}, "adapter_to provider and owner"),
        (terms_of(generations_to=[]), {"generations_to": ("owner",)}, "generations_to owner"),
        (terms_of(queries_by=[]), {"queries_by": ("owner",)}, "queries_by owner"),
        (terms_of(max_queries=9), {"max_queries": 10}, "10 queries"),
        (terms_of(partners=["00" * 32]), {}, "the partner"),
        (terms_of(expires=int(NOW) - 1), {}, "the date"),
        (terms_of(workers=[]), {}, "workers that the job does not name"),
        *[({"version": 3}, {"profile": name}, f"profile {name}") for name in PROFILES if name != "shared"],
        (terms_of(), {"switches": {"permute_mlp": False}}, "permute_mlp=False"),
    ],
)
def test_a_job_beyond_an_owners_terms(tmp_path: Path, kind: str, terms: Any, asked: Any, text: str) -> None:
    """Though both have signed it."""
    digest, header = seal(tmp_path, kind, LAB if kind == "model" else CLINIC, terms)
    fields = {"profile": "balanced", "switches": {}, **asked, kind: digest}
    with pytest.raises(ConsentError, match=f"terms of the {kind} do not allow: .*{text}"):
        check_input(sign(Job(**job_fields(**fields))), kind, digest, header, now=NOW)


def test_terms_that_are_none(tmp_path: Path) -> None:
    for terms, error, text in (
        (terms_of(profiles="all of them"), FormatError, "terms of the data do not fit"),
        (None, ConsentError, "no terms of the data"),
        ({"profiles": ["balanced"]}, ConsentError, "are of another version"),  # which gave what it left out
        ({"version": 3.0}, ConsentError, "are of another version"),
    ):
        digest, header = seal(tmp_path, "data", CLINIC, terms)
        with pytest.raises(error, match=text):
            check_input(sign(Job(**job_fields(data=digest))), "data", digest, header, now=NOW)


def test_queries() -> None:
    job = Job(**job_fields(max_queries=10, max_new_tokens=5))
    owner, good = CLINIC.public.fingerprint, {"prompts": 4, "before": 6, "tokens": 5, "now": job.expires - 1}
    check_query(job, owner, **good)
    for who, changes, text in (
        (LAB.public.fingerprint, {}, "no queries"),
        (STRANGER.public.fingerprint, {}, "no queries"),
        (owner, {"now": job.expires}, "expired"),
        (owner, {"tokens": 6}, "longer"),
        (owner, {"before": 7}, "used up"),
        (owner, {"prompts": 5}, "used up"),
    ):
        with pytest.raises(ConsentError, match=text):
            check_query(job, who, **{**good, **changes})
