"""Jobs: one canonical form, signed by both; any change, and any other signature, is refused."""

import base64
import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from obfuscatune.errors import ConsentError, FormatError, UsageError
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.job import MAX_JOB_BYTES, Job, SignedJob

from .jobs import CLINIC, LAB, STRANGER, job_fields, sign

# Some combinations of switches warn that one of them has no effect; a signer should read that.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SIGNED = sign(Job(**job_fields()))
FILE = SIGNED.to_bytes()
ONE_SIDED = {"lab": sign(SIGNED.job, LAB), "clinic": sign(SIGNED.job, CLINIC)}

roles = st.sampled_from([(), ("provider",), ("owner",), ("provider", "owner")])
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
jobs = st.builds(
    lambda **fields: Job(**job_fields(**fields)),
    enclave=digests,
    model=digests,
    data=digests,
    prompts=st.none() | digests,
    profile=st.sampled_from(["plain", "naive", "paper", "balanced", "enclave"]),
    switches=st.fixed_dictionaries(
        {}, optional={"kappa": st.floats(1, 1e8), "key_block": st.integers(2, 512), "mlp": st.just("enclave")}
    ),
    dtype=st.sampled_from(["float32", "float64", "bfloat16"]),
    training=st.fixed_dictionaries({}, optional={"learning_rate": st.floats(0, 1), "lora_r": st.integers(1, 64)}),
    max_new_tokens=st.integers(1, 65_536),
    adapter_to=roles,
    generations_to=roles,
    queries_by=roles,
    max_queries=st.integers(0, 1_000_000),
    nonce=digests,
)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def altered(change: Any) -> bytes:
    fields = json.loads(FILE)
    change(fields)
    return encode(fields)


@given(jobs)
def test_round_trip(job: Job) -> None:
    assert Job.from_dict(json.loads(encode(job.to_dict()))) == job
    signed = sign(job)
    again = SignedJob.from_bytes(signed.to_bytes())
    assert again == signed and again.to_bytes() == signed.to_bytes() and again.job.digest == job.digest
    assert signed.missing() == [] and signed == sign(job, CLINIC, LAB)


def test_roles_and_parties(tmp_path: Path) -> None:
    assert SIGNED.party("provider") == LAB.public and SIGNED.party("owner") == CLINIC.public
    assert SIGNED.job.role_of(STRANGER.public.fingerprint) is None
    assert ONE_SIDED["lab"].missing() == ["owner"] and ONE_SIDED["clinic"].missing() == ["provider"]
    assert SignedJob(SIGNED.job).missing() == ["provider", "owner"]
    assert SIGNED.sign(LAB) == SIGNED
    path = tmp_path / "job.json"
    path.write_bytes(FILE + b"\n")  # as an editor leaves it
    assert SignedJob.load(path) == SIGNED
    with pytest.raises(UsageError, match="cannot read"):
        SignedJob.load(tmp_path / "none")


def test_only_parties_sign() -> None:
    with pytest.raises(ConsentError, match="not a party"):
        SIGNED.sign(STRANGER)
    # The same name and the same sealing key, but another signing key: another identity.
    with pytest.raises(ConsentError, match="not a party"):
        SIGNED.sign(Identity.generate("lab", "x25519"))


@given(st.sampled_from(sorted(SIGNED.job.to_dict())), values)
@example("switches", {})
@example("switches", {"mlp": "worker"})
@example("switches", {"profile": "plain"})
@example("training", {"seed": 2**64 - 1})
@example("training", {"learning_rate": 1e-3, "lora_target_modules": ["c_attn"], "max_steps": 5})
@example("prompts", None)
@example("max_queries", 11)
@example("max_queries", True)
@example("adapter_to", ["provider", "owner"])
@example("adapter_to", ["owner", "provider"])
@example("expires", SIGNED.job.expires + 1)
def test_any_changed_field_is_refused(name: str, value: Any) -> None:
    fields = copy.deepcopy(SIGNED.job.to_dict())
    try:
        if encode({"v": fields[name]}) == encode({"v": value}):
            return
        data = altered(lambda file: file["job"].__setitem__(name, value))
    except FormatError:
        return  # no canonical form at all
    with pytest.raises((FormatError, ConsentError)):
        SignedJob.from_bytes(data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, "dd" * 32) for name in ("enclave", "model", "data", "prompts", "nonce")],
        *[("profile", name) for name in ("plain", "naive", "paper", "enclave")],
        *[("switches", {"enclave_blocks": 1}), ("switches", {}), ("dtype", "bfloat16"), ("training", {})],
        *[(name, ["provider"]) for name in ("adapter_to", "generations_to", "queries_by")],
        *[("max_new_tokens", 33), ("max_queries", 11), ("created", 5), ("expires", SIGNED.job.expires + 1)],
    ],
)
def test_a_changed_option_makes_the_signatures_void(name: str, value: Any) -> None:
    """What the test above leaves to chance: values that fit, so that nothing but the signature is wrong."""
    changed = {**SIGNED.job.to_dict(), name: value}
    assert Job.from_dict(changed).digest != SIGNED.job.digest
    with pytest.raises(ConsentError, match="signature does not fit the job"):
        SignedJob.from_bytes(altered(lambda file: file["job"].__setitem__(name, value)))


@pytest.mark.parametrize("name", sorted(SIGNED.job.to_dict()))
def test_a_missing_or_unknown_field_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        SignedJob.from_bytes(altered(lambda file: file["job"].pop(name)))
    with pytest.raises(FormatError):
        SignedJob.from_bytes(altered(lambda file: file["job"].__setitem__(name + "x", 1)))


def entry(identity: Identity, context: str = "job", job: Job = SIGNED.job) -> dict[str, Any]:
    signature = identity.sign(context, encode(job.to_dict()))
    return {"identity": identity.public.to_dict(), "signature": base64.b64encode(signature).decode()}


def test_foreign_signatures() -> None:
    with pytest.raises(ConsentError, match="no party"):
        SignedJob.from_bytes(altered(lambda file: file["signatures"].__setitem__(0, entry(STRANGER))))
    for context in ("sealed file", "log head", ""):
        with pytest.raises(ConsentError, match="does not fit"):
            SignedJob.from_bytes(altered(lambda file, c=context: file.update(signatures=[entry(LAB, c)])))
    other = Job(**job_fields(nonce="00" * 32))
    with pytest.raises(ConsentError, match="does not fit"):
        SignedJob.from_bytes(altered(lambda file: file.update(signatures=[entry(LAB, job=other)])))

    def swap(file: Any) -> None:  # each signature under the other's identity
        first, second = file["signatures"]
        first["signature"], second["signature"] = second["signature"], first["signature"]

    with pytest.raises(ConsentError, match="does not fit"):
        SignedJob.from_bytes(altered(swap))


def test_signatures_are_there_once_and_in_order() -> None:
    with pytest.raises(FormatError, match="two signatures of one party"):
        SignedJob.from_bytes(altered(lambda file: file.update(signatures=[entry(LAB), entry(LAB)])))
    with pytest.raises(FormatError, match="too many"):
        SignedJob.from_bytes(altered(lambda file: file["signatures"].append(entry(LAB))))
    with pytest.raises(FormatError, match="order"):
        SignedJob.from_bytes(altered(lambda file: file["signatures"].reverse()))


def test_a_signature_has_one_spelling() -> None:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def respell(file: Any) -> None:
        text = file["signatures"][0]["signature"]
        assert text.endswith("==")
        last = digits[digits.index(text[-3]) ^ 1]  # bits that no byte has
        file["signatures"][0]["signature"] = text[:-3] + last + "=="
        assert base64.b64decode(file["signatures"][0]["signature"]) == base64.b64decode(text)

    with pytest.raises(FormatError, match="base64"):
        SignedJob.from_bytes(altered(respell))


@pytest.mark.parametrize(
    "wrong",
    [None, 5, [], {}, "", "A", "é" * 88, "A" * 88, base64.b64encode(bytes(63)).decode(), " " + entry(LAB)["signature"]],
)
def test_a_signature_of_a_wrong_form(wrong: Any) -> None:
    with pytest.raises((FormatError, ConsentError)):
        SignedJob.from_bytes(altered(lambda file: file["signatures"][0].update(signature=wrong)))


@pytest.mark.parametrize("wrong", [None, {}, "x", [None], [[]], [{}], [{"identity": {}, "signature": ""}]])
def test_signatures_of_a_wrong_form(wrong: Any) -> None:
    with pytest.raises(FormatError):
        SignedJob.from_bytes(altered(lambda file: file.update(signatures=wrong)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"owner": LAB.public.fingerprint}, "the same identity"),
        ({"provider": "AA" * 32}, "provider is not 64 hex digits"),
        ({"prompts": 7}, "prompts is not"),
        ({"adapter_to": ("owner", "provider")}, "adapter_to is not a list"),
        ({"adapter_to": ("owner", "owner")}, "adapter_to is not a list"),
        ({"adapter_to": ("operator",)}, "adapter_to is not a list"),
        ({"max_new_tokens": 0}, "max_new_tokens is not"),
        ({"max_queries": 1.0}, "max_queries is not"),
        ({"max_queries": -1}, "max_queries is not"),
        ({"dtype": "float16"}, "dtype is not"),
        ({"dtype": []}, "dtype is not"),
        ({"created": 10, "expires": 10}, "expires before"),
        ({"profile": "fast"}, "unknown profile"),
        ({"profile": None}, "wrong type"),
        ({"switches": []}, "wrong type"),
        ({"switches": {"profile": "plain"}}, "unknown switch"),
        ({"switches": {"remote": False}}, "unknown switch"),
        ({"switches": {"kappa": 0.5}}, "do not fit"),
        ({"switches": {"mlp": ["worker"]}}, "do not fit"),
        ({"training": {"learning_rate": "fast"}}, "do not fit"),
        ({"training": {"output_dir": "/etc"}}, "unknown"),
        ({"training": None}, "not a map"),
    ],
)
def test_a_job_that_does_not_fit(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        Job(**job_fields(**changes))


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(FormatError, match=r"enclave is not.*; max_queries is not.*; dtype is not"):
        Job(**job_fields("x", max_queries=-1, dtype="int8"))


@given(st.binary(max_size=200))
def test_arbitrary_bytes(data: bytes) -> None:
    with pytest.raises((FormatError, ConsentError)):
        SignedJob.from_bytes(data)


@given(values)
def test_arbitrary_values(value: Any) -> None:
    with pytest.raises(FormatError):
        Job.from_dict(value)
    for part in ({"job": value, "signatures": []}, {"job": SIGNED.job.to_dict(), "signatures": value}):
        try:
            data = encode(part)
        except FormatError:
            continue
        if value != []:
            with pytest.raises((FormatError, ConsentError)):
                SignedJob.from_bytes(data)


@given(
    st.dictionaries(
        st.sampled_from(["keys", "mlp", "kappa", "key_block", "head_keys", "lora_placement", "profile", "name"]),
        values | st.sampled_from(["monarch", "enclave", "worker"]),
        max_size=4,
    )
)
def test_arbitrary_switches(switches: dict[str, Any]) -> None:
    try:
        job = Job(**job_fields(switches=switches))
    except FormatError:
        return
    assert job.profile_name.startswith("balanced")


def test_random_corruptions_are_refused() -> None:
    generator = random.Random(7)
    for _ in range(1000):
        data, where = bytearray(FILE), generator.randrange(len(FILE))
        match generator.randrange(4):
            case 0:
                data[where] ^= 1 << generator.randrange(8)
            case 1:
                data[where] = (data[where] + generator.randrange(1, 256)) % 256
            case 2:
                del data[where : where + generator.randrange(1, 20)]
            case 3:
                data.insert(where, generator.randrange(256))
        if bytes(data) == FILE:  # a byte inserted beside its like: say so rather than count it
            continue
        with pytest.raises((FormatError, ConsentError)) as caught:
            SignedJob.from_bytes(bytes(data))
        assert type(caught.value) in (FormatError, ConsentError)
        assert caught.value.__cause__ is None and len(str(caught.value)) < 3000


def test_too_long() -> None:
    with pytest.raises(FormatError, match="too long"):
        SignedJob.from_bytes(b"{" + b" " * MAX_JOB_BYTES)
