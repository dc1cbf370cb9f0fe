"""The TPM's verifier on recorded evidence (vectors/tpm, from a real swtpm) and on quotes that are written here."""

import contextlib
import dataclasses
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.errors import AttestationError, FormatError
from obfuscatune.parties.attestation.evidence import Evidence, Quote, report_data
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.tpm_structures import TpmQuote, parse_quote, parse_signature
from obfuscatune.parties.attestation.verdict import Verdict
from obfuscatune.parties.attestation.verify import judge
from obfuscatune.parties.canonical import decode, encode

from .enclaves import NONCE, TLS_KEY, claims
from .samples import failed, with_extra

VECTORS = {path.stem: path for path in (Path(__file__).parents[2] / "vectors" / "tpm").glob("*.json")}
ISSUED = 1_800_000_000
ZERO = "00" * 32
BOOTED = {f"pcr{n}": frozenset({ZERO}) for n in (4, 12, 13)}  # of a TPM that nobody has booted with
INFO = PublicFormat.SubjectPublicKeyInfo
OPEN = [(9,), (11,), (4,), (4, 8), (4, 9), (4, 11), (4, 12), (4, 13)]  # PCRs that do not pin what runs


def recorded(name: str) -> Evidence:
    return Evidence.from_bytes(VECTORS[name].read_bytes())


def pin(pem: bytes) -> str:
    return hashlib.sha256(load_pem_public_key(pem).public_bytes(Encoding.DER, INFO)).hexdigest()


def policy_for(evidence: Evidence, **changes: object) -> Policy:
    """Accepts the simulated TPM that made the evidence, as long as PCRs 4 and 12 to 14 have their value."""
    fields = {
        "simulation_tpm_keys": frozenset({pin(evidence.quote.extras["key"])}),
        "allow_simulation": True,
        "measurements": {**BOOTED, "pcr14": frozenset({ZERO})},
    }
    return Policy(("tpm",), **{**fields, **changes})


def judged(evidence: Evidence, policy: Policy, nonce: str = NONCE) -> Verdict:
    return judge(evidence, policy, nonce=nonce, tls_key=TLS_KEY, now=ISSUED + 5)


@pytest.fixture(params=["ecdsa", "rsassa"])
def evidence(request: pytest.FixtureRequest) -> Evidence:
    return recorded(request.param)


def test_recorded_evidence_is_accepted_as_simulation(evidence: Evidence) -> None:
    verdict = judged(evidence, policy_for(evidence))
    assert verdict.accepted, str(verdict)
    assert verdict.simulation
    assert verdict.require().nonce == NONCE
    assert set(verdict.measurements) == {f"pcr{index}" for index in (*range(10), *range(11, 16))}


def test_a_pinned_key_is_no_simulation(evidence: Evidence) -> None:
    key = frozenset({pin(evidence.quote.extras["key"])})
    policy = policy_for(evidence, tpm_keys=key, simulation_tpm_keys=frozenset(), allow_simulation=False)
    verdict = judged(evidence, policy)
    assert verdict.accepted, str(verdict)
    assert not verdict.simulation


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"simulation_tpm_keys": frozenset({"ab" * 32})}, "key"),
        ({"allow_simulation": False}, "key"),
        ({"measurements": {**BOOTED, "pcr14": frozenset({"ab" * 32})}}, "pcr14"),
        ({"measurements": {**BOOTED, "pcr10": frozenset({ZERO})}}, "pcr10"),  # which the quote does not cover
        ({"measurements": {}}, "measurements"),
        ({"measurements": {"pcr16": frozenset({ZERO})}}, "measurements"),  # which software may reset
        # Firmware, its settings, secure boot: they leave open which programs were started.
        (
            {"measurements": {f"pcr{n}": frozenset({ZERO}) for n in (0, 1, 2, 3, 5, 6, 7, 8, 12, 13, 14, 15)}},
            "measurements",
        ),
        # What any system can set once it runs; and PCR 4 without what its program takes from outside.
        ({"measurements": {f"pcr{n}": frozenset({ZERO}) for n in (8, 9, 11, 12, 13)}}, "measurements"),
        *(({"measurements": {f"pcr{n}": frozenset({ZERO}) for n in some}}, "measurements") for some in OPEN),
    ],
)
def test_a_stricter_policy_refuses(evidence: Evidence, changes: dict, rule: str) -> None:
    verdict = judged(evidence, policy_for(evidence, **changes))
    assert failed(verdict)[0] == rule
    with pytest.raises(AttestationError, match=f"rule '{rule}'"):
        verdict.require()


def test_another_nonce_is_refused(evidence: Evidence) -> None:
    assert failed(judged(evidence, policy_for(evidence), nonce="cd" * 32)) == ["nonce"]
    replayed = dataclasses.replace(evidence, claims={**evidence.claims, "nonce": "cd" * 32})
    assert failed(judged(replayed, policy_for(evidence), nonce="cd" * 32)) == ["claims"]


def test_parts_of_another_quote_are_refused(evidence: Evidence) -> None:
    other = recorded("rsassa" if evidence.quote.quote == recorded("ecdsa").quote.quote else "ecdsa").quote
    policy = policy_for(evidence)
    for name, rule in (("signature", "signature"), ("key", "key")):
        swapped = Evidence(with_extra(evidence.quote, name, other.extras[name]), evidence.claims)
        assert failed(judged(swapped, policy))[0] == rule
    values = decode(evidence.quote.extras["pcrs"], "PCR values")
    values["sha256"]["14"] = "ab" * 32
    # The values that the policy wants, beside a quote over others, and the other way round.
    swapped = Evidence(with_extra(evidence.quote, "pcrs", encode(values)), evidence.claims)
    wanting = policy_for(evidence, measurements={**BOOTED, "pcr14": frozenset({"ab" * 32})})
    assert failed(judged(swapped, wanting))[0] == "pcrs"


def test_an_unknown_or_missing_part_is_refused(evidence: Evidence) -> None:
    for name in ("signature", "key", "pcrs"):
        extras = {part: data for part, data in evidence.quote.extras.items() if part != name}
        verdict = judged(Evidence(Quote("tpm", evidence.quote.quote, extras), evidence.claims), policy_for(evidence))
        assert failed(verdict)[0] == "format"
    extended = Evidence(with_extra(evidence.quote, "more", b""), evidence.claims)
    assert failed(judged(extended, policy_for(evidence)))[0] == "format"


@pytest.mark.parametrize("name", ["ecdsa", "rsassa"])
def test_a_thousand_corruptions_are_refused(name: str) -> None:
    genuine = recorded(name)
    policy, encoded = policy_for(genuine), genuine.to_bytes()
    parts = {"quote": genuine.quote.quote, **genuine.quote.extras}
    refused = {"format": 0, "verdict": 0}

    @settings(max_examples=1000, deadline=None, database=None)
    @given(st.sampled_from(["file", *parts]), st.data())
    def check(part: str, data: st.DataObject) -> None:
        whole = encoded if part == "file" else parts[part]
        at, left_out = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 8))
        changed = whole[:at] + data.draw(st.binary(max_size=8)) + whole[at + left_out :]
        if changed == whole:
            return
        try:
            if part == "file":
                candidate = Evidence.from_bytes(changed)
            elif part == "quote":
                candidate = Evidence(Quote("tpm", changed, genuine.quote.extras), genuine.claims)
            else:
                candidate = Evidence(with_extra(genuine.quote, part, changed), genuine.claims)
        except FormatError:
            refused["format"] += 1
            return
        assert not judged(candidate, policy).accepted
        refused["verdict"] += 1

    check()
    assert sum(refused.values()) > 900
    assert min(refused.values()) > 50  # the file's form and the verdict: both were reached


# Quotes written here, field after field as the TCG's specification has them.
def attest_bytes(
    *,
    magic: int = 0xFF544347,
    kind: int = 0x8018,
    name: bytes = b"\0\x0b" + bytes(32),
    extra: bytes = bytes(32),
    safe: int = 1,
    firmware: int = 7,
    selection: list[tuple[int, bytes]] | None = None,
    digest: bytes = bytes(32),
) -> bytes:
    banks = [(0x0B, b"\x10\0\0")] if selection is None else selection
    return (
        struct.pack(">IH", magic, kind)
        + struct.pack(">H", len(name)) + name
        + struct.pack(">H", len(extra)) + extra
        + struct.pack(">QIIBQ", 5, 1, 0, safe, firmware)
        + struct.pack(">I", len(banks))
        + b"".join(struct.pack(">HB", bank, len(bits)) + bits for bank, bits in banks)
        + struct.pack(">H", len(digest)) + digest
    )  # fmt: skip


def tpm2b(number: int) -> bytes:
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return struct.pack(">H", len(data)) + data


P384 = ec.generate_private_key(ec.SECP384R1())
RSA = rsa.generate_private_key(65537, 2048)


def by_ec(message: bytes) -> bytes:
    r, s = decode_dss_signature(P384.sign(message, ec.ECDSA(hashes.SHA384())))
    return struct.pack(">HH", 0x18, 0x0C) + tpm2b(r) + tpm2b(s)


def by_pss(salt: int) -> Callable[[bytes], bytes]:
    def sign(message: bytes) -> bytes:
        signature = RSA.sign(message, padding.PSS(padding.MGF1(hashes.SHA256()), salt), hashes.SHA256())
        return struct.pack(">HHH", 0x16, 0x0B, len(signature)) + signature

    return sign


SIGNERS = {
    "ecdsa P-384": (P384, "sha384", by_ec),
    "rsapss, longest salt": (RSA, "sha256", by_pss(padding.PSS.MAX_LENGTH)),
    "rsapss, salt of a hash": (RSA, "sha256", by_pss(32)),
}


def written(signer: str) -> Evidence:
    """Evidence over PCRs 4, 12 and 13 (sha256) and PCR 0 (sha384), in this order, by a key of ours."""
    key, name, sign = SIGNERS[signer]
    values = {"sha256": {"4": ZERO, "12": ZERO, "13": ZERO}, "sha384": {"0": "cd" * 48}}
    digest = hashlib.new(name, bytes(3 * 32) + b"\xcd" * 48).digest()
    said = claims(issued=ISSUED).to_dict()
    qualifying = hashlib.sha256(report_data(said)).digest()
    selection = [(0x0B, b"\x10\x30\0"), (0x0C, b"\x01\0\0")]
    message = attest_bytes(extra=qualifying, selection=selection, digest=digest)
    pem = key.public_key().public_bytes(Encoding.PEM, INFO)
    return Evidence(Quote("tpm", message, {"signature": sign(message), "key": pem, "pcrs": encode(values)}), said)


@pytest.mark.parametrize("signer", SIGNERS)
def test_every_kind_of_signature(signer: str) -> None:
    evidence = written(signer)
    policy = policy_for(evidence, measurements=BOOTED)
    verdict = judged(evidence, policy)
    assert verdict.accepted, str(verdict)
    assert verdict.measurements == dict.fromkeys(BOOTED, ZERO)  # policies name PCRs of the SHA-256 bank
    other = SIGNERS["ecdsa P-384" if signer.startswith("rsa") else "rsapss, salt of a hash"][2]
    swapped = with_extra(evidence.quote, "signature", other(evidence.quote.quote))
    assert failed(judged(Evidence(swapped, evidence.claims), policy))[0] == "signature"


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 1024),  # noqa: S505 - what must be refused
        ec.generate_private_key(ec.SECP256K1()),
        ed25519.Ed25519PrivateKey.generate(),
    ],
)
def test_a_key_of_an_unknown_or_weak_kind_is_refused(key: rsa.RSAPrivateKey) -> None:
    evidence = recorded("ecdsa")
    pem = key.public_key().public_bytes(Encoding.PEM, INFO)
    policy = policy_for(evidence, simulation_tpm_keys=frozenset({pin(pem)}))
    verdict = judged(Evidence(with_extra(evidence.quote, "key", pem), evidence.claims), policy)
    assert failed(verdict)[0] == "format"


@pytest.mark.parametrize(
    "changes",
    [
        {"magic": 0xFF544348},
        {"kind": 0x8017},
        {"name": bytes(67)},
        {"extra": bytes(65)},
        {"safe": 2},
        {"selection": []},
        {"selection": [(0x0B, b"\1\0\0")] * 2},
        {"selection": [(bank, b"\1\0\0") for bank in (0x0B, 0x0C, 0x0D, 0x0B)]},
        {"selection": [(0x04, b"\1\0\0")]},  # SHA-1
        {"selection": [(0x0B, bytes(4))]},
        {"digest": bytes(65)},
    ],
    ids=str,
)
def test_a_quote_of_another_form_is_refused(changes: dict) -> None:
    assert parse_quote(attest_bytes()).selection == (("sha256", 4),)
    with pytest.raises(FormatError):
        parse_quote(attest_bytes(**changes))


def test_a_quote_that_is_cut_or_longer_is_refused() -> None:
    for parse, data in ((parse_quote, attest_bytes()), (parse_signature, recorded("ecdsa").quote.extras["signature"])):
        parse(data)
        for size in range(len(data)):
            with pytest.raises(FormatError):
                parse(data[:size])
        with pytest.raises(FormatError, match="1 bytes"):
            parse(data + b"\0")


@given(
    st.binary(max_size=64), st.integers(0, 2**64 - 1), st.sets(st.integers(0, 23)), st.binary(max_size=64)
)  # fmt: skip
def test_a_quote_is_read_as_it_was_written(extra: bytes, firmware: int, pcrs: set[int], digest: bytes) -> None:
    bits = sum(1 << index for index in pcrs).to_bytes(3, "little")
    data = attest_bytes(extra=extra, firmware=firmware, selection=[(0x0D, bits)], digest=digest)
    selection = tuple(("sha512", index) for index in sorted(pcrs))
    assert parse_quote(data) == TpmQuote(extra, firmware, selection, digest)


@settings(max_examples=500)
@given(st.sampled_from([b"", attest_bytes()[:50], attest_bytes()[:90], b"\0\x18\0\x0b"]), st.binary(max_size=300))
def test_any_bytes_are_read_or_a_format_error(head: bytes, tail: bytes) -> None:
    for parse in (parse_quote, parse_signature):
        with contextlib.suppress(FormatError):
            parse(head + tail)
