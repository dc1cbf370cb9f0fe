"""Terms: what an owner allows, by exact names; a job beyond them is told where."""

import contextlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import FormatError, ObfuscatuneError, UsageError
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.job import Job
from obfuscatune.parties.terms import DEFAULT_PROFILES, Terms, load_terms
from obfuscatune.parties.vocabulary import MAX_QUERIES, ROLES, Role, profile_name
from obfuscatune.profiles import PROFILES, SWITCHES

from .jobs import CLINIC, LAB, job_fields

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
roles = st.sampled_from([(), ("provider",), ("owner",), ("provider", "owner")])
terms = st.builds(
    Terms,
    profiles=st.lists(st.sampled_from(["balanced", "enclave", "balanced+mlp=enclave"])).map(tuple),
    adapter_to=roles,
    generations_to=roles,
    queries_by=roles,
    max_queries=st.integers(0, MAX_QUERIES),
    partners=st.lists(st.binary(min_size=32, max_size=32).map(bytes.hex), max_size=3).map(tuple),
    expires=st.integers(0, 1 << 53),
)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ROLES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


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


def test_defaults_show_nothing_in_plain_coordinates() -> None:
    assert Terms.from_dict(None) == Terms.from_dict({}) == Terms()
    assert Terms().faults(job(), "owner", NOW) == []
    assert DEFAULT_PROFILES == ("balanced", "enclave")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("profile", sorted(set(PROFILES) - {"shared"}))
def test_each_profile_by_its_name(profile: str, role: Role) -> None:
    asked = job(profile=profile)
    assert Terms(profiles=(profile,)).faults(asked, role, NOW) == []
    others = Terms(profiles=tuple(name for name in PROFILES if name != profile))
    assert [fault.split()[:2] for fault in others.faults(asked, role, NOW)] == [["profile", profile]]


@pytest.mark.parametrize("switches", [{}, {"spares": 1}, {"weights": "open"}])
def test_shares_are_not_for_jobs(switches: dict[str, Any]) -> None:
    """The operator would name the workers, all three of them his own."""
    with pytest.raises(FormatError, match="secret shares, whose workers' operators no terms can name yet"):
        job(profile="shared", switches=switches)
    with pytest.raises(FormatError):
        Terms.from_dict({"profiles": ["shared"]})


@pytest.mark.parametrize("switch", sorted(set(SWITCHES) - {"weights", "primes", "threshold", "spares"}))
def test_each_switch_is_another_profile(switch: str) -> None:
    base = NEEDS.get(switch, {})
    without, with_it = job(switches=base), job(switches={**base, switch: CHANGED[switch]})
    assert with_it.profile_name != without.profile_name
    assert Terms(profiles=(without.profile_name,)).faults(without, "owner", NOW) == []
    assert Terms(profiles=(without.profile_name,)).faults(with_it, "owner", NOW) != []
    assert Terms.from_dict({"profiles": [with_it.profile_name]}).faults(with_it, "owner", NOW) == []


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["adapter_to", "generations_to", "queries_by"])
def test_who_gets_what(name: str, role: Role) -> None:
    for allowed in ((), ("provider",), ("owner",), ROLES):
        for asked in ((), ("provider",), ("owner",), ROLES):
            faults = Terms(**{name: allowed}).faults(job(**{name: asked}), role, NOW)
            assert bool(faults) == (not set(asked) <= set(allowed))
            assert all(name in fault for fault in faults)


def test_queries_partners_and_the_date() -> None:
    asked = job(max_queries=10)
    assert Terms(max_queries=10).faults(asked, "owner", NOW) == []
    assert Terms(max_queries=9).faults(asked, "owner", NOW) == ["10 queries (allowed: 9)"]
    lab, clinic = LAB.public.fingerprint, CLINIC.public.fingerprint
    assert Terms(partners=(lab,)).faults(asked, "owner", NOW) == []
    assert Terms(partners=(clinic,)).faults(asked, "provider", NOW) == []
    assert Terms(partners=(clinic,)).faults(asked, "owner", NOW) == [f"the partner {lab[:16]}"]
    assert Terms(partners=(lab,)).faults(asked, "provider", NOW) == [f"the partner {clinic[:16]}"]
    assert Terms(expires=100).faults(asked, "owner", 100) == []
    assert Terms(expires=100).faults(asked, "owner", 100.5) == ["the date"]
    everything = Terms(profiles=(), adapter_to=(), generations_to=(), queries_by=(), max_queries=0, partners=(clinic,))
    assert len(everything.faults(asked, "owner", NOW)) == 6


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
        ({"expires": 1.5}, "expires is not"),
        ([], "not a map"),
    ],
)
def test_terms_that_do_not_fit(fields: Any, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        Terms.from_dict(fields)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(FormatError, match=r"unknown 'x'; queries_by .*; partners .*; expires"):
        Terms.from_dict({"x": 1, "queries_by": 1, "partners": 1, "expires": -1})


@given(st.dictionaries(st.sampled_from(sorted(Terms.__dataclass_fields__)) | st.text(max_size=5), values, max_size=4))
def test_arbitrary_fields(fields: dict[str, Any]) -> None:
    try:
        found = Terms.from_dict(fields)
    except FormatError:
        return
    assert Terms.from_dict(found.to_dict()) == found


@given(st.text(max_size=30) | st.text("+=balancedmlp_kys.0123456789", max_size=30).map("balanced+".__add__))
def test_arbitrary_names_of_profiles(name: str) -> None:
    try:
        Terms.from_dict({"profiles": [name]})
    except FormatError:
        return
    assert name.split("+")[0] in PROFILES


def test_a_file(tmp_path: Path) -> None:
    text = (
        'profiles = ["enclave", "balanced+mlp=enclave"]\nadapter_to = ["owner"]\nmax_queries = 5\nexpires = 2027-06-30'
    )
    fields = load_terms(write(tmp_path / "terms.toml", text))
    found = Terms.from_dict(fields)
    assert found.profiles == ("enclave", "balanced+mlp=enclave") and found.max_queries == 5
    assert found.adapter_to == ("owner",) and found.queries_by == ROLES
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
