"""Profiles: what their names say, each switch alone, and all faults in one message."""

import contextlib
import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from obfuscatune import UsageError
from obfuscatune.cli.options import CLAIMS
from obfuscatune.profiles import PROFILES, SWITCHES, Profile, resolve


def test_the_named_profiles() -> None:
    assert list(PROFILES) == ["plain", "naive", "paper", "balanced", "strict", "stream", "shared", "enclave"]
    assert all(name == profile.name and profile.summary and profile.audience for name, profile in PROFILES.items())
    assert [name for name, profile in PROFILES.items() if not profile.remote] == ["enclave"]


@pytest.mark.parametrize("page", ["README.md", "docs/security.md"])
def test_pages_say_for_whom_each_profile_is_and_what_it_claims_in_its_own_words(page: str) -> None:
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    for profile in PROFILES.values():
        assert f"| `{profile.name}` | {profile.audience} | {profile.claim} |" in text


@pytest.mark.parametrize("page", ["README.md", "docs/security.md"])
def test_pages_and_help_claim_what_the_records_do(page: str) -> None:
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    for profile in PROFILES.values():
        rows = [
            line for line in plain.splitlines() if line.startswith("| `") and f"`{profile.name}`" in line.split("|")[1]
        ]
        assert any(profile.claim in row.split("|")[-2] for row in rows), profile.name
        assert f"{profile.name}: {profile.claim}\n" in CLAIMS


def test_naive_is_paper_under_other_keys() -> None:
    names = {f.name for f in dataclasses.fields(Profile)} - {"name", "summary", "audience", "claim"}
    different = {name for name in names if getattr(PROFILES["naive"], name) != getattr(PROFILES["paper"], name)}
    assert different == {"keys"}
    assert (PROFILES["naive"].keys, PROFILES["paper"].keys) == ("gaussian", "haar")


def test_paper_and_balanced_are_what_the_design_says() -> None:
    paper, balanced = PROFILES["paper"], PROFILES["balanced"]
    assert (paper.attention, paper.mlp, paper.inner_keys, paper.lora_placement) == (
        "enclave",
        "enclave",
        "identity",
        "worker",
    )
    assert (balanced.attention, balanced.mlp, balanced.keys, balanced.lora_placement) == (
        "worker",
        "worker",
        "monarch",
        "enclave",
    )
    assert balanced.head_keys and balanced.permute_mlp and balanced.fold_norms
    assert balanced.head_kappa <= 4


def test_strict_keeps_everything_but_products_inside() -> None:
    strict = PROFILES["strict"]
    assert (strict.attention, strict.mlp, strict.lora_placement) == ("enclave", "enclave", "enclave")
    assert strict.mix_rows and strict.verify and strict.keys == strict.inner_keys == "monarch"
    assert resolve("strict", mix_rows=False).name == "strict+mix_rows=False"
    assert resolve("strict", mix_tile=128).mix_tile == 128


@pytest.mark.parametrize("switch", [{"attention": "worker"}, {"mlp": "worker"}, {"lora_placement": "split"}], ids=str)
def test_rows_are_mixed_only_where_every_output_returns(switch: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="mix_rows needs attention, mlp and lora_placement in the enclave"):
        resolve("strict", **switch)


def test_what_the_worker_adds_of_an_adapter_cannot_be_verified() -> None:
    with pytest.raises(UsageError, match="verify needs lora_placement=enclave"):
        resolve("paper", verify=True)
    assert resolve("paper", verify=True, lora_placement="enclave").verify


def test_stream_is_balanced_in_one_call() -> None:
    stream = PROFILES["stream"]
    assert resolve("balanced", rotate_stream=True, lora_placement="split").switches() == stream.switches()
    assert resolve("stream", enclave_blocks=1).enclave_blocks == 1
    assert resolve("stream", keys="identity", head_keys=False).name == "stream+keys=identity+head_keys=False"


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"attention": "enclave"}, "rotate_stream needs attention and mlp on the worker"),
        ({"mlp": "enclave"}, "rotate_stream needs attention and mlp on the worker"),
        ({"lora_placement": "worker"}, "rotate_stream needs lora_placement=split"),
        ({"lora_placement": "enclave"}, "rotate_stream needs lora_placement=split"),
        ({"fold_norms": False}, "rotate_stream needs fold_norms"),
        ({"keys": "conditioned"}, "rotate_stream needs orthogonal keys, which conditioned ones are not"),
        ({"keys": "gaussian"}, "rotate_stream needs orthogonal keys"),
        ({"mix_rows": True}, "mix_rows needs"),
        ({"verify": True}, "verify needs"),
        ({"rotate_stream": 1}, "rotate_stream is 1"),
    ],
    ids=str,
)
def test_what_a_rotated_stream_cannot_have(switches: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve("stream", **switches)


def test_profiles_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROFILES["paper"].keys = "identity"  # type: ignore[misc]


@pytest.mark.parametrize("name", PROFILES)
def test_a_name_alone_gives_the_profile(name: str) -> None:
    assert resolve(name) == PROFILES[name]
    assert resolve(name, mlp=None, kappa=None) == PROFILES[name]
    assert resolve(PROFILES[name]) == PROFILES[name]


CHANGES: dict[str, Any] = {
    "keys": "haar",
    "inner_keys": "conditioned",
    "attention": "enclave",
    "mlp": "enclave",
    "head_keys": False,
    "permute_mlp": False,
    "fold_norms": False,
    "lora_placement": "split",
    "enclave_blocks": 2,
    "key_block": 16,
    "kappa": 8.0,
    "head_kappa": 1.0,
    "mix_tile": 128,
    "verify": True,
    "primes": 5,
    "threshold": 2,
    "spares": 1,
}


IDLE_IN_BALANCED = {"inner_keys", "kappa", "mix_tile", "verify", "primes", "threshold", "spares"}


def test_every_switch_can_be_set_alone() -> None:
    # These fit no profile but strict, stream and shared.
    assert {*CHANGES, "mix_rows", "rotate_stream", "weights"} == set(SWITCHES)
    for switch, value in CHANGES.items():
        idle = switch in IDLE_IN_BALANCED
        with pytest.warns(UserWarning, match=f"{switch} has no effect") if idle else contextlib.nullcontext():
            resolved = resolve("balanced", **{switch: value})
        assert getattr(resolved, switch) == value
        assert resolved.name == ("balanced" if idle else f"balanced+{switch}={value}")
        assert resolved == dataclasses.replace(PROFILES["balanced"], name=resolved.name, **{switch: value})


def test_shares_need_all_but_the_products_inside_and_their_numbers_in_range() -> None:
    for profile, switches, what in (
        (
            "balanced",
            {"weights": "shared"},
            "needs attention, mlp and lora_placement in the enclave.*needs identity keys",
        ),
        ("strict", {"weights": "open"}, "needs identity keys"),
        ("shared", {"weights": "both"}, "not one of keyed, shared, open"),
        ("shared", {"primes": 1}, "primes is 1, not 0, or 2 to 7"),
        ("shared", {"primes": 8}, "primes is 8, not 0, or 2 to 7"),
        ("shared", {"threshold": 3}, "threshold is 3, not 1 to 2"),
        ("shared", {"threshold": 0}, "threshold is 0, not a whole number of at least 1"),
        ("shared", {"spares": 9}, "spares is 9, not 0 to 8"),
        ("shared", {"spares": True}, "spares is True"),
    ):
        with pytest.raises(UsageError, match=what):
            resolve(profile, **switches)
    assert resolve("shared", weights="open", primes=5, spares=1).name == "shared+weights=open+primes=5+spares=1"


def test_names_tell_what_is_changed_and_nothing_else() -> None:
    assert resolve("balanced", mlp="worker").name == "balanced"
    assert resolve("balanced", head_kappa=2, mlp="enclave").name == "balanced+mlp=enclave+head_kappa=2.0"
    assert resolve(resolve("balanced", mlp="enclave"), head_kappa=2).name == "balanced+mlp=enclave+head_kappa=2.0"


@pytest.mark.parametrize(
    ("profile", "switches"),
    [
        ("paper", {"kappa": 32.0}),
        ("paper", {"key_block": 8}),
        ("paper", {"head_keys": True}),
        ("paper", {"head_kappa": 2.0}),
        ("paper", {"permute_mlp": True}),
        ("balanced", {"inner_keys": "haar"}),
        ("enclave", {"keys": "haar"}),
    ],
)
def test_a_switch_without_effect_is_warned_of_and_not_named(profile: str, switches: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=f"{next(iter(switches))} has no effect"):
        assert resolve(profile, **switches).name == profile


def test_profiles_do_the_same_exactly_where_their_switches_are_equal() -> None:
    assert resolve("balanced", head_kappa=4).switches() == PROFILES["balanced"].switches()
    changed = dataclasses.replace(PROFILES["balanced"], key_block=32)  # the name does not tell
    assert changed.name == "balanced" and changed.switches() != PROFILES["balanced"].switches()


def test_lora_on_the_worker_unfolds_the_norms_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="row norms of the activations show") as caught:
        resolved = resolve("balanced", lora_placement="worker")
    assert len(caught) == 1
    assert not resolved.fold_norms
    assert resolved.name == "balanced+lora_placement=worker"


@pytest.mark.parametrize(("name", "switches"), [("paper", {}), ("balanced", {"fold_norms": False})])
def test_no_warning_where_nothing_is_unfolded(name: str, switches: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(name, lora_placement="worker", **switches).lora_placement == "worker"


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"balancd.*plain, naive, paper, balanced, strict, stream, shared, enclave"):
        resolve("balancd")


def test_unknown_switches_are_all_named() -> None:
    with pytest.raises(UsageError, match=r"colour, mpl.*keys, inner_keys"):
        resolve("balanced", mpl="enclave", colour=3)
    with pytest.raises(UsageError, match="remote"):
        resolve("balanced", remote=False)


def test_all_faults_come_in_one_message() -> None:
    with pytest.raises(UsageError) as caught:
        resolve("balanced", keys="rot13", mlp="outside", enclave_blocks=-1, key_block=True, kappa=0.5, head_kappa="4")
    for fault in ("keys is 'rot13'", "mlp is 'outside'", "enclave_blocks is -1", "key_block is True", "kappa is 0.5"):
        assert fault in str(caught.value)
    assert "head_kappa is '4'" in str(caught.value)
    assert "haar" in str(caught.value)


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("enclave_blocks", 1.5),
        ("key_block", 2.5),
        ("kappa", float("nan")),
        ("kappa", float("inf")),
        ("fold_norms", "no"),
        ("mix_rows", 1),
        ("verify", 3),
        ("mix_tile", 32),
        ("head_keys", 1),
    ],
)
def test_values_of_the_wrong_kind(switch: str, value: Any) -> None:
    with pytest.raises(UsageError, match=switch):
        resolve("balanced", **{switch: value})


def test_a_sharing_says_what_its_own_switches_hide() -> None:
    openly, two, spare = (
        resolve("shared", **switches) for switches in ({"weights": "open"}, {"threshold": 2}, {"spares": 1})
    )
    assert "weights in the clear" in openly.summary and "the weights from nobody" in openly.audience
    assert openly.claim.startswith("nothing on weights") and "on 2 workers" in openly.summary
    assert "any 2 operators together see" in two.claim and "any 3 together have everything" in two.claim
    assert "on 4 workers" in spare.summary and "any 2 together have everything" in spare.claim
    for same in (resolve("shared"), resolve("shared", primes=3), resolve("shared", verify=True)):
        assert (same.summary, same.audience, same.claim) == (
            PROFILES["shared"].summary,
            PROFILES["shared"].audience,
            PROFILES["shared"].claim,
        )
