"""Terms: what an owner allows, by exact names; a job beyond them is told where."""

import contextlib
import json
import math
import re
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.errors import FormatError, ObfuscatuneError, UsageError
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.exposure import hides_all, line, statement
from obfuscatune.parties.job import Job
from obfuscatune.parties.quotas import QUOTAS, training_tokens
from obfuscatune.parties.terms import Terms, load_terms, template
from obfuscatune.parties.vocabulary import MAX_QUERIES, ROLES, Role, Worker, profile_name, profile_named
from obfuscatune.profiles import PROFILES, SWITCHES
from obfuscatune.settings import TrainingSettings

from .jobs import CLINIC, LAB, job_fields
from .jobs import terms as terms_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NOW = time.time()
# Each switch of `balanced` set to something else, as somebody would who wants to be shown more.
CHANGED = {
    "keys": "identity",
    "inner_keys": "identity",
    "attention": "enclave",
    "mlp": "enclave",
    "head_keys": False,
    "permute_mlp": False,
    "fold_norms": False,
    "lora_placement": "worker",
    "enclave_blocks": 1,
    "key_block": 2,
    "kappa": 2.0,
    "head_kappa": 1.0,
    "mix_rows": True,
    "mix_tile": 64,
    "verify": True,
    "rotate_stream": True,
}
# What a switch needs of the others to be allowed, or to have an effect.
INSIDE = {"attention": "enclave", "mlp": "enclave"}
NEEDS = {
    "kappa": {"keys": "conditioned", "attention": "enclave"},
    "inner_keys": {"keys": "conditioned", "attention": "enclave"},
    "mix_rows": INSIDE,
    "mix_tile": {**INSIDE, "mix_rows": True},
    "verify": {"attention": "enclave"},
    "rotate_stream": {"lora_placement": "split"},
}
SMALL = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
roles = st.sampled_from([(), ("provider",), ("owner",), ("provider", "owner")])
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
workers = st.lists(
    st.builds(Worker, digests, st.sampled_from(["a", "b c"])), max_size=4, unique_by=lambda w: w.fingerprint
)
terms = st.builds(
    lambda profiles, **fields: Terms(profiles=tuple(profiles), shows=lines(profiles), **fields),
    profiles=st.lists(st.sampled_from(["balanced", "enclave", "shared", "balanced+mlp=enclave"])),
    adapter_to=roles,
    generations_to=roles,
    queries_by=roles,
    max_queries=st.integers(0, MAX_QUERIES),
    **{quota.name: st.integers(0, quota.greatest) for quota in QUOTAS},
    partners=st.lists(digests, max_size=3).map(tuple) | st.just("any"),
    expires=st.integers(0, 1 << 53) | st.just("never"),
    workers=workers.map(tuple) | st.just("any"),
    min_operators=st.integers(2, 16),
)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ROLES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def lines(names: Any) -> dict[str, str]:
    """The lines that terms hold for the profiles that show something."""
    return {name: text for name in names if (text := line(profile_named(name)))}


def given_all(*profiles: str, **changes: Any) -> Terms:
    return Terms.from_dict(terms_of(*profiles, **changes))


def job(**changes: Any) -> Job:
    return Job(**job_fields(**{"switches": {}, **changes}))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@given(terms)
def test_round_trip(given_terms: Terms) -> None:
    fields = given_terms.to_dict()
    assert Terms.from_dict(fields) == given_terms
    assert Terms.from_dict(json.loads(encode(fields))) == given_terms


def test_what_is_left_out_is_refused() -> None:
    left_out = Terms.from_dict({"version": 3})
    assert left_out == Terms()
    faults = left_out.faults(job(), "owner", NOW)
    for name in ("profile", "adapter_to", "generations_to", "queries_by", "10 queries", "partner", "date", "workers"):
        assert any(name in fault for fault in faults), (name, faults)
    assert given_all().faults(job(), "owner", NOW) == []
    for name in terms_of():
        if name not in ("version", "shows"):
            fields = {key: value for key, value in terms_of().items() if key != name}
            fields |= {"shows": {}} if name == "profiles" else {}
            assert Terms.from_dict(fields).faults(job(), "owner", NOW) != [], f"{name} is left out, and given"


@pytest.mark.parametrize(
    "fields", [None, {}, {"version": 1}, {"version": 2}, {"version": True}, {"profiles": ["balanced"]}]
)
def test_terms_of_an_older_version_are_refused_by_name(fields: Any) -> None:
    with pytest.raises(FormatError, match="sealed without" if fields is None else "are of another version"):
        Terms.from_dict(fields)


@pytest.mark.parametrize("role", ROLES)
def test_the_template_shows_no_worker_anything(role: Role, tmp_path: Path) -> None:
    """Who fills in the partner and nothing else has allowed what shows the operator of a worker nothing."""
    found = Terms.from_dict(load_terms(write(tmp_path / "terms.toml", template(role, [LAB.public.fingerprint]))))
    assert [profile_named(name) for name in found.profiles if not hides_all(profile_named(name))] == []
    asked = {"adapter_to": ("owner",), "generations_to": ("owner",), "queries_by": ("owner",)}
    for name in PROFILES:
        faults = found.faults(
            job(profile=name, workers=OPERATORS[:3] if name == "shared" else (), **asked), "owner", NOW
        )
        assert (faults == []) == (name == "enclave"), (name, faults)  # shared: no worker is trusted yet


def test_a_weaker_profile_needs_its_line() -> None:
    for name in ("balanced", "plain", "balanced+mlp=enclave", "shared+weights=open"):
        with pytest.raises(FormatError, match="needs its line"):
            Terms.from_dict({"version": 3, "profiles": [name]})
        with pytest.raises(FormatError, match="needs its line"):
            Terms.from_dict({"version": 3, "profiles": [name], "shows": {name: "shows nothing"}})
        assert given_all(name).profiles == (name,)
    assert Terms.from_dict({"version": 3, "profiles": ["enclave", "shared", "shared+spares=1"]}).shows == {}
    with pytest.raises(FormatError, match="not allowed: plain"):
        Terms.from_dict({"version": 3, "shows": lines(["plain"])})


def test_every_profile_says_what_it_shows() -> None:
    assert [name for name in PROFILES if hides_all(PROFILES[name])] == ["shared", "enclave"]
    for profile in PROFILES.values():
        assert hides_all(profile) or "shows" in line(profile) or "hands" in line(profile)
        assert len(statement(profile)) >= 2


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("profile", sorted(set(PROFILES) - {"shared"}))
def test_each_profile_by_its_name(profile: str, role: Role) -> None:
    asked = job(profile=profile)
    assert given_all(profile).faults(asked, role, NOW) == []
    others = given_all(*(name for name in PROFILES if name != profile))
    assert [fault.split()[:2] for fault in others.faults(asked, role, NOW)] == [["profile", profile]]


OPERATORS = tuple(Worker(f"{number:02x}" * 32, f"operator {number}") for number in range(1, 5))


@pytest.mark.parametrize("switches", [{}, {"spares": 1}, {"threshold": 2}, {"weights": "open"}])
def test_a_sharing_names_its_workers_each_of_another_operator(switches: dict[str, Any]) -> None:
    scheme = Scheme.make(**{"weights": "shared", **switches})
    count = len(scheme.points)
    named = tuple(Worker(f"{number:02x}" * 32, f"operator {number}") for number in range(count))
    asked = job(profile="shared", switches=switches, workers=named)
    assert asked.resolved.share_workers == count == len(asked.workers)
    assert Job.from_dict(asked.to_dict()) == asked
    same = (replace(named[0], operator=named[1].operator), *named[1:])
    for workers, text in (((), "workers of a job"), (named[1:], "workers of a job"), (same, "have one operator")):
        with pytest.raises(FormatError, match=text):
            job(profile="shared", switches=switches, workers=workers)
    with pytest.raises(FormatError, match="names a worker twice"):
        job(profile="shared", switches=switches, workers=(*named[:-1], named[0]))
    with pytest.raises(FormatError, match="workers of a job that has none"):
        job(profile="enclave", workers=named)


SPELLINGS = (("A Cloud", "a  cloud"), ("Caf\u00e9", "Cafe\u0301"), ("ACME", "\uff21CME"))


@pytest.mark.parametrize(("first", "second"), SPELLINGS)
def test_an_operator_spelled_in_two_ways_is_one(first: str, second: str) -> None:
    """It would have two shares of one polynomial, and so all that is shared."""
    named = (replace(OPERATORS[0], operator=first), replace(OPERATORS[1], operator=second), OPERATORS[2])
    with pytest.raises(FormatError, match="have one operator"):
        job(profile="shared", workers=named)


def test_terms_name_workers_and_their_operators() -> None:
    three = OPERATORS[:3]
    asked, fields = job(profile="shared", workers=three), [worker.to_dict() for worker in three]
    assert given_all("shared", workers=fields).faults(asked, "owner", NOW) == []
    for changes, text in (
        ({"workers": "any"}, "the terms name each"),
        ({"workers": fields[:2]}, "the worker 0303030303030303 of operator 3"),
        ({"workers": [{**fields[0], "operator": "another"}, *fields[1:]]}, "as operator 1's: it is another's"),
        ({"workers": fields, "min_operators": 4}, r"workers of 3 operators \(asked for: 4\)"),
        ({}, "the terms name each"),
    ):
        faults = given_all("shared", **changes).faults(asked, "owner", NOW)
        assert len(faults) == 1 and re.search(text, faults[0]), faults
    # Two operators are fewer than terms ask for unless they say so.
    pair = job(profile="shared", switches={"weights": "open"}, workers=OPERATORS[:2])
    openly = given_all("shared+weights=open", workers=fields)
    assert openly.faults(pair, "owner", NOW) == ["workers of 2 operators (asked for: 3)"]
    assert replace(openly, min_operators=2).faults(pair, "owner", NOW) == []
    # Keyed profiles too: who names workers wants no others.
    keyed = given_all("balanced", workers=fields)
    assert keyed.faults(job(), "owner", NOW) == ["workers that the job does not name"]
    assert keyed.faults(job(workers=three[:1]), "owner", NOW) == []
    assert keyed.faults(job(workers=OPERATORS[3:]), "owner", NOW) != []


@pytest.mark.parametrize("switch", sorted(set(SWITCHES) - {"weights", "primes", "threshold", "spares"}))
def test_each_switch_is_another_profile(switch: str) -> None:
    base = NEEDS.get(switch, {})
    without, with_it = job(switches=base), job(switches={**base, switch: CHANGED[switch]})
    assert with_it.profile_name != without.profile_name
    assert given_all(without.profile_name).faults(without, "owner", NOW) == []
    assert given_all(without.profile_name).faults(with_it, "owner", NOW) != []
    assert given_all(with_it.profile_name).faults(with_it, "owner", NOW) == []


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["adapter_to", "generations_to", "queries_by"])
def test_who_gets_what(name: str, role: Role) -> None:
    for allowed in ((), ("provider",), ("owner",), ROLES):
        for asked in ((), ("provider",), ("owner",), ROLES):
            faults = replace(given_all(), **{name: allowed}).faults(job(**{name: asked}), role, NOW)
            assert bool(faults) == (not set(asked) <= set(allowed))
            assert all(name in fault for fault in faults)


@pytest.mark.parametrize(
    ("quota", "asked", "changes"),
    [
        ("max_jobs", 1, {}),
        ("max_training_tokens", 4 * 8 * 512, {}),
        ("max_training_tokens", 5 * 2 * 3 * 32, {"training": {"max_steps": 5, **dict(SMALL, max_length=32)}}),
        ("max_new_tokens", 33, {"max_new_tokens": 33}),
        ("max_stored_bytes", 1, {}),
    ],
)
@pytest.mark.parametrize("role", ROLES)
def test_quotas_that_a_job_alone_tells(quota: str, asked: int, changes: Any, role: Role) -> None:
    assert given_all(**{quota: asked}).faults(job(**changes), role, NOW) == []
    text = f"{quota}: {asked:,} (allowed: {asked - 1:,})"
    assert given_all(**{quota: asked - 1}).faults(job(**changes), role, NOW) == [text]


@given(st.integers(1, 500), st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 5))
def test_passes_over_the_data_are_counted_as_the_trainer_counts_them(
    rows: int, batch: int, each: int, epochs: float
) -> None:
    settings = TrainingSettings(
        num_train_epochs=epochs, per_device_train_batch_size=batch, gradient_accumulation_steps=each, max_length=10
    )
    batches = -(-rows // batch)
    steps = math.ceil(epochs * max(batches // each + int(batches % each > 0), 1))
    assert training_tokens(settings, rows) == steps * batch * each * 10
    assert training_tokens(settings) is None  # the job alone does not tell: the enclave counts


def test_queries_partners_and_the_date() -> None:
    asked = job(max_queries=10)
    assert given_all(max_queries=10).faults(asked, "owner", NOW) == []
    assert given_all(max_queries=9).faults(asked, "owner", NOW) == ["10 queries (allowed: 9)"]
    lab, clinic = LAB.public.fingerprint, CLINIC.public.fingerprint
    assert given_all(partners=[lab]).faults(asked, "owner", NOW) == []
    assert given_all(partners=[clinic]).faults(asked, "provider", NOW) == []
    assert given_all(partners=[clinic]).faults(asked, "owner", NOW) == [f"the partner {lab[:16]}"]
    assert given_all(partners=[lab]).faults(asked, "provider", NOW) == [f"the partner {clinic[:16]}"]
    assert given_all(expires=100).faults(asked, "owner", 100) == []
    assert given_all(expires=100).faults(asked, "owner", 100.5) == ["the date: they have expired"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"profile": ["balanced"]}, "unknown 'profile'"),
        ({"profiles": "balanced"}, "profiles is not"),
        ({"profiles": ["fast"]}, "profiles is not"),
        ({"profiles": [1]}, "profiles is not"),
        ({"profiles": ["balanced+mlp"]}, "profiles is not"),
        ({"profiles": ["balanced+mlp=worker"]}, "profiles is not"),  # what it does anyhow: its name has no switch
        ({"profiles": ["balanced+profile=plain"]}, "profiles is not"),
        ({"profiles": ["balanced+kappa=nan"]}, "profiles is not"),
        ({"profiles": ["balanced+key_block=3_2"]}, "profiles is not"),
        ({"profiles": ["balanced+key_block=" + "9" * 5000]}, "profiles is not"),
        ({"adapter_to": "owner"}, "adapter_to is not"),
        ({"adapter_to": ["owner", "owner"]}, "adapter_to is not"),
        ({"queries_by": ["operator"]}, "queries_by is not"),
        ({"generations_to": [["owner"]]}, "generations_to is not"),
        ({"partners": ["lab"]}, "partners is not"),
        ({"partners": ["AA" * 32]}, "partners is not"),
        ({"max_queries": -1}, "max_queries is not"),
        ({"max_queries": True}, "max_queries is not"),
        ({"max_queries": MAX_QUERIES + 1}, "max_queries is not"),
        *[({quota.name: value}, f"{quota.name} is not") for quota in QUOTAS for value in (-1, 1.0, quota.greatest + 1)],
        ({"expires": 1.5}, "expires is not"),
        ({"expires": "later"}, "expires is not"),
        ({"partners": "anybody"}, "partners is not"),
        ({"workers": "all"}, "workers is not a list"),
        ({"workers": [{}]}, "a worker with other fields"),
        ({"workers": [{"fingerprint": "00", "operator": "a"}]}, "a worker's fingerprint"),
        ({"workers": [{"fingerprint": "00" * 32, "operator": " a"}]}, "a worker's operator"),
        ({"workers": [{"fingerprint": "00" * 32, "operator": "a\x1b"}]}, "a worker's operator"),
        ({"min_operators": 1}, "min_operators is not"),
        ({"shows": {"balanced": 1}}, "shows is not"),
        ([], "not a map"),
    ],
)
def test_terms_that_do_not_fit(fields: Any, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        Terms.from_dict({"version": 3, **fields} if isinstance(fields, dict) else fields)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(FormatError, match=r"unknown 'x'; queries_by .*; partners .*; expires"):
        Terms.from_dict({"version": 3, "x": 1, "queries_by": 1, "partners": 1, "expires": -1})


@given(st.dictionaries(st.sampled_from(sorted(Terms.__dataclass_fields__)) | st.text(max_size=5), values, max_size=4))
def test_arbitrary_fields(fields: dict[str, Any]) -> None:
    try:
        found = Terms.from_dict({"version": 3, **fields})
    except FormatError:
        return
    assert Terms.from_dict(found.to_dict()) == found


@given(st.text(max_size=30) | st.text("+=balancedmlp_kys.0123456789", max_size=30).map("balanced+".__add__))
def test_arbitrary_names_of_profiles(name: str) -> None:
    try:
        given_all(profiles=[name], shows={})
    except FormatError:
        return
    assert name.split("+")[0] in PROFILES


def test_a_file(tmp_path: Path) -> None:
    text = (
        'version = 3\nprofiles = ["enclave"]\nadapter_to = ["owner"]\nmax_queries = 5\nexpires = 2027-06-30\n'
        f'[[workers]]\nfingerprint = "{"00" * 32}"\noperator = "a cloud"\n'
    )
    fields = load_terms(write(tmp_path / "terms.toml", "\ufeff" + text))  # as editors of Windows write it
    found = Terms.from_dict(fields)
    assert found.profiles == ("enclave",) and found.max_queries == 5
    assert found.adapter_to == ("owner",) and found.queries_by == ()
    assert found.workers == (Worker("00" * 32, "a cloud"),)
    assert found.expires == 1814399999  # the last second of that day, UTC
    assert encode(fields)


@pytest.mark.parametrize(
    "text",
    [
        "profiles = [",
        "expires = 2027-02-30",
        "expires = 2027-06-30T12:00:00Z",
        "expires = 12:00:00",
        "max_queries = " + "9" * 5000,
        "max_queries = " + "[" * 30_000,
        "max_queries = nan",
        "max_queries = 5\nmax_queries = 6",
        "[profiles]\nx = 1",
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(FormatError):
        load_terms(write(tmp_path / "terms.toml", text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        load_terms(tmp_path / "none")
    with pytest.raises(UsageError, match="too long"):
        load_terms(write(tmp_path / "long", "#" * 70_000))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="not TOML"):
        load_terms(tmp_path / "bytes")


@given(st.binary(max_size=60))
def test_arbitrary_files(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "arbitrary.toml"
    path.write_bytes(data)
    with contextlib.suppress(ObfuscatuneError):
        load_terms(path)


def test_a_switch_without_effect_is_not_in_the_name() -> None:
    """The signer is told by a warning; the terms speak of what is done."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert profile_name("balanced", {"kappa": 100.0}) == "balanced"
    assert "kappa has no effect" in str(caught[0].message)
