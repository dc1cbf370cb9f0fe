"""Targets of attestation: claims, evidence, policies, quotes of each kind up to the verdict, the TLS certificate."""

import base64
import hashlib
import json
import ssl
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from target import Finding, Target

from obfuscatune.parties.canonical import decode, encode
from obfuscatune.parties.identity import Identity

# PCRs that a policy for a TPM must name, as of a unified kernel image with nothing beside it.
_BOOTED = {"pcr4": "11" * 32, "pcr12": "00" * 32, "pcr13": "00" * 32}


def claims(scratch: Path) -> Target:
    """What an enclave says about itself."""
    from obfuscatune.parties.attestation.claims import EnclaveClaims

    return Target(lambda data: EnclaveClaims.from_dict(decode(data, "claims")), (encode(_claims()),))


def evidence(scratch: Path) -> Target:
    """The evidence record."""
    from obfuscatune.parties.attestation.evidence import Evidence, Quote

    seed = Evidence(Quote("tpm", b"quote", {"signature": b"s", "key": b"k"}), _claims()).to_bytes()
    return Target(Evidence.from_bytes, (seed,))


def policy(scratch: Path) -> Target:
    """A policy file. The verifier's own, but often one that somebody sent along."""
    from obfuscatune.parties.attestation.policy import Policy

    path = scratch / "policy.toml"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        Policy.load(path)

    return Target(
        parse, (_policy("sgx", mrenclave="00" * 32), _policy("tpm", f'[tpm]\nkeys = ["{"1" * 64}"]', **_BOOTED))
    )


def certificate(scratch: Path) -> Target:
    """The TLS certificate of an enclave, with evidence in it."""
    from obfuscatune.parties.attestation.platform import open_platform
    from obfuscatune.parties.channel.certificate import make_certificate, read_certificate

    made = make_certificate(Identity.generate("enclave").public, open_platform(f"simulation:{scratch / 'p'}").attester)
    return Target(read_certificate, (made.der,), strict=True)


def worker_certificate(scratch: Path) -> Target:
    """The TLS certificate of a worker, which the enclave compares with a fingerprint."""
    from obfuscatune.parties.link import check_worker, credentials_of

    worker, other = Identity.generate("gpu1"), Identity.generate("gpu2")
    shown = [ssl.PEM_cert_to_DER_cert(_leaf(credentials_of(each, "worker").chain)) for each in (worker, other)]
    pin = worker.public.fingerprint
    return Target(lambda data: check_worker(data, pin, "worker"), (shown[0],), strict=True, refused=(shown[1],))


def _leaf(chain: str) -> str:
    return chain[: chain.index("-----BEGIN ENCRYPTED")]


def judged_tdx(scratch: Path) -> Target:
    """Evidence of a TDX machine, from its record to the verdict: quote, certificates, collateral."""
    record = _simulated(scratch, "simulation")
    sgx = replace(record, quote=replace(record.quote, kind="sgx"))
    return _judged(scratch, "tdx", taken=[record], refused=[sgx])


def judged_snp(scratch: Path) -> Target:
    """Evidence of an SEV-SNP machine, from its record to the verdict: report and certificates."""
    return _judged(scratch, "snp", taken=[_simulated(scratch, "simulation-snp")], refused=[])


def judged_tpm(scratch: Path) -> Target:
    """Evidence of a vTPM, from its record to the verdict: quote, signature, key, PCRs; the TPM is a key of our own."""
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    from obfuscatune.parties.attestation.evidence import Evidence, Quote, report_data
    from obfuscatune.parties.attestation.tpm import binds

    key = generate_private_key(SECP256R1())
    public = [
        key.public_key().public_bytes(form, PublicFormat.SubjectPublicKeyInfo) for form in (Encoding.PEM, Encoding.DER)
    ]
    made = _claims()
    values = b"".join(map(bytes.fromhex, _BOOTED.values()))
    quote = _tpm_quote(binds(report_data(made)), hashlib.sha256(values).digest())
    numbers = (number.to_bytes(32, "big") for number in decode_dss_signature(key.sign(quote, ECDSA(SHA256()))))
    pcrs = encode({"sha256": {name.removeprefix("pcr"): value for name, value in _BOOTED.items()}})
    record = Evidence(
        Quote("tpm", quote, {"signature": _tpm_signature(*numbers), "key": public[0], "pcrs": pcrs}), made
    )
    return _judged(scratch, "tpm", taken=[record], refused=[], key=hashlib.sha256(public[1]).hexdigest())


def tpm_quote(scratch: Path) -> Target:
    """A TPMS_ATTEST."""
    from obfuscatune.parties.attestation.tpm_structures import parse_quote

    return Target(parse_quote, (_tpm_quote(bytes(32), bytes(32)),))


def tpm_signature(scratch: Path) -> Target:
    """A TPMT_SIGNATURE."""
    from obfuscatune.parties.attestation.tpm_structures import parse_signature

    rsa = bytes.fromhex("0014000b0100") + bytes(256)
    return Target(parse_signature, (_tpm_signature(b"\1" * 32, b"\1" * 32), rsa))


def event_log(scratch: Path) -> Target:
    """A TDX event log, read and replayed."""
    from obfuscatune.parties.attestation import eventlog

    header = b"Spec ID Event03\0" + bytes(8) + struct.pack("<IHHB", 1, 0x0C, 48, 0)
    seed = struct.pack("<II20sI", 0, 3, b"", len(header)) + header
    for register in (1, 2, 4):
        seed += struct.pack("<IIIH48sI", register, 0x80000007, 1, 0x0C, bytes([register]) * 48, 5) + b"event"
    return Target(lambda data: eventlog.replay(eventlog.read(data)), (seed, seed + b"\xff" * 64))


def hcl_report(scratch: Path) -> Target:
    """An HCL report of Azure, shown: its hardware's report and the key in its runtime data."""
    from obfuscatune.parties.attestation import azure

    modulus = base64.urlsafe_b64encode(b"\x81" * 256).rstrip(b"=").decode()
    key = {"kid": "HCLAkPub", "key_ops": ["sign"], "kty": "RSA", "e": "AQAB", "n": modulus}
    runtime = json.dumps({"keys": [key]}).encode()
    rest = struct.pack("<5I", len(runtime) + 20, 1, 4, 1, len(runtime)) + runtime
    seed = b"HCLA" + struct.pack("<4I", 1, 32 + 1184 + len(rest), 2, 0) + bytes(12 + 1184) + rest
    return Target(azure.peek, (seed, seed + bytes(100)))


def nitro_document(scratch: Path) -> Target:
    """A document of an AWS Nitro enclave, shown: its PCRs and what it binds."""
    import cbor2

    from obfuscatune.parties.attestation import nitro

    fields = {
        **{
            "module_id": "i",
            "digest": "SHA384",
            "timestamp": 1,
            "certificate": b"leaf",
            "cabundle": [b"root", b"zone"],
        },
        **{"pcrs": {0: bytes(48)}, "public_key": None, "user_data": bytes(64), "nonce": None},
    }
    protected = bytes.fromhex("a1013822")
    return Target(nitro.peek, (cbor2.dumps([protected, {}, cbor2.dumps(fields), bytes(96)]),))


def gpu_report(scratch: Path) -> Target:
    """A report of a GPU and a reference made of it."""
    from obfuscatune.parties.attestation.gpu_reference import read_reference, write_reference
    from obfuscatune.parties.attestation.gpu_report import parse
    from obfuscatune.parties.attestation.simulated_gpu import SimulatedGpu

    seed = SimulatedGpu.open(scratch / "gpu").report(bytes(32))[0]
    return Target(lambda data: read_reference(write_reference(parse(data))), (seed,))


def _claims() -> dict[str, Any]:
    from obfuscatune.parties.attestation.claims import EnclaveClaims

    public = Identity.generate("enclave", "x25519").public
    return EnclaveClaims(public, "1" * 64, "2" * 64, int(time.time()), "0.1.0").to_dict()


def _policy(kind: str, extra: str = "", **measurements: str) -> bytes:
    """A policy of this kind, and nothing that a kind does not need."""
    lines = ["[platform]", f'kinds = ["{kind}"]', "max_age_seconds = 86400"]
    lines += ["[platform.min_tcb]", "bootloader = 0", "tee = 0", "snp = 0", "microcode = 0"] if kind == "snp" else []
    lines += ["[measurements]", *(f'{name} = ["{value}"]' for name, value in measurements.items())]
    lines += [] if measurements else ["any_measurement = true"]
    lines += [extra]
    return "\n".join(lines).encode()


def _tpm_quote(extra_data: bytes, digest: bytes) -> bytes:
    """TPMS_ATTEST of type quote over ``_BOOTED`` of SHA-256: the TCG's structure with the numbers that matter here."""
    head = bytes.fromhex("ff54434780180022000b") + bytes(32) + struct.pack(">H", len(extra_data)) + extra_data
    return head + bytes(16) + b"\1" + bytes(8) + bytes.fromhex("00000001000b03103000") + b"\0\x20" + digest


def _tpm_signature(r: bytes, s: bytes) -> bytes:
    """TPMT_SIGNATURE, ECDSA with SHA-256."""
    return bytes.fromhex("0018000b") + b"".join(struct.pack(">H", len(number)) + number for number in (r, s))


def _simulated(scratch: Path, platform: str) -> Any:
    """Evidence of a simulated machine, which it makes in ``scratch``."""
    from obfuscatune.parties.attestation.evidence import attest
    from obfuscatune.parties.attestation.platform import open_platform

    return attest(open_platform(f"{platform}:{scratch}").attester, _claims())


def _judged(scratch: Path, kind: str, *, taken: list[Any], refused: list[Any], key: str = "") -> Target:
    from obfuscatune.parties.attestation.evidence import Evidence
    from obfuscatune.parties.attestation.policy import Policy
    from obfuscatune.parties.attestation.verify import judge

    extra = f'keys = ["{key}"]' if key else f'allow = true\nroot = "{scratch}/simulation-root.pem"'
    table = "tpm" if key else "simulation"
    path = scratch / "policy.toml"
    path.write_bytes(_policy(kind, f"[{table}]\n{extra}", **(_BOOTED if key else {})))
    allowed = Policy.load(path)

    def parse(data: bytes) -> None:
        verdict = judge(Evidence.from_bytes(data), allowed)
        text = str(verdict)
        if not text.replace("\n", "").isprintable():
            raise Finding(f"verdict with a character that does not print: {text[:200]!a}")
        verdict.require()

    return Target(parse, tuple(e.to_bytes() for e in taken), refused=tuple(e.to_bytes() for e in refused))
