"""AWS Nitro: the genuine sample at its own time, documents under a root of the tests, and what is refused of both."""

import ctypes
import dataclasses
import datetime
import hashlib
import random
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding

from obfuscatune.errors import AttestationError, FormatError
from obfuscatune.parties.attestation import nitro as module
from obfuscatune.parties.attestation import nitro_enclave
from obfuscatune.parties.attestation.evidence import Evidence, Quote, attest, report_data
from obfuscatune.parties.attestation.platform import open_platform
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.verify import judge, judge_quote

from .enclaves import NONCE, TLS_KEY, claims
from .samples import failed, load, needs_samples

TIME = 1_766_668_537  # the document's own
POLICY = Policy(("nitro",))
DAY = datetime.timedelta(days=1)


def sample() -> bytes:
    """The document within the sample's envelope."""
    data = load("nitro/nitro.bin")
    size = len(cbor2.dumps(cbor2.loads(data[4:])))
    return data[4 : 4 + size]


@needs_samples
def test_the_sample_verifies_at_its_time_and_at_no_other() -> None:
    found = judge_quote(Quote("nitro", sample()), POLICY, now=TIME)
    assert not found.failed and not found.simulation, str(found)
    assert found.measurements["nitro_pcr0"].startswith("5cb70295") and found.measurements["nitro_pcr2"][:4] == "743e"
    for hours in (-4, 4, 24 * 365):
        assert failed(judge_quote(Quote("nitro", sample()), POLICY, now=TIME + hours * 3600)) == ["certificates"]
    root = x509.load_pem_x509_certificate(load("nitro/nitro_root.pem")).public_bytes(Encoding.DER)
    assert hashlib.sha256(root).hexdigest() == module.AWS_NITRO_ROOT
    assert module.peek(sample())["report data"] == "00" * 64
    wrong = dataclasses.replace(POLICY, measurements={"nitro_pcr0": frozenset({"00" * 48})})
    assert failed(judge_quote(Quote("nitro", sample()), wrong, now=TIME)) == ["nitro_pcr0"]


@needs_samples
@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_corruptions_of_the_sample_are_refused(count: int) -> None:
    document, generator = sample(), random.Random(7)
    for _ in range(count):
        changed = bytearray(document)
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        assert judge_quote(Quote("nitro", bytes(changed)), POLICY, now=TIME).failed
    for size in (0, 1, 8, 100, len(document) - 1):
        assert failed(judge_quote(Quote("nitro", document[:size]), POLICY, now=TIME)) == ["format"]
    assert failed(judge_quote(Quote("nitro", document + b"\0"), POLICY, now=TIME)) == ["format"]


class Cloud:
    """A root, an issuer under it, and documents as the hypervisor signs them."""

    def __init__(self, *, issuer_is_authority: bool = True, path_length: int | None = None, curve: Any = None) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self._life = (now - DAY, now + DAY)
        root_key, issuer_key, self.key = (generate_private_key(SECP384R1()) for _ in range(3))
        if curve is not None:
            self.key = generate_private_key(curve)
        root = self._issue("root", root_key, "root", root_key, True, path_length)
        issuer = self._issue("zone", issuer_key, "root", root_key, issuer_is_authority, None)
        leaf = self._issue("enclave", self.key, "zone", issuer_key, False, None)
        self.root, self.bundle = root, [root, issuer]
        self.fields = {
            **{"module_id": "i-1", "digest": "SHA384", "timestamp": 1, "certificate": leaf, "cabundle": self.bundle},
            "pcrs": {0: b"\1" * 48, 8: bytes(48)},
            **{"public_key": None, "user_data": bytes(64), "nonce": None},
        }

    def _issue(self, name: str, key: Any, issuer: str, issuer_key: Any, authority: bool, length: int | None) -> bytes:
        names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in (name, issuer)]
        builder = x509.CertificateBuilder(
            names[1], names[0], key.public_key(), x509.random_serial_number(), *self._life
        )
        builder = builder.add_extension(x509.BasicConstraints(authority, length if authority else None), critical=True)
        return builder.sign(issuer_key, SHA384()).public_bytes(Encoding.DER)

    def document(self, protected: bytes = bytes.fromhex("a1013822"), **changes: Any) -> bytes:
        payload = cbor2.dumps({**self.fields, **changes})
        r, s = decode_dss_signature(
            self.key.sign(cbor2.dumps(["Signature1", protected, b"", payload]), ECDSA(SHA384()))
        )
        return cbor2.dumps([protected, {}, payload, r.to_bytes(48, "big") + s.to_bytes(48, "big")])

    def policy(self, **changes: Any) -> Policy:
        fields = {"measurements": {"nitro_pcr0": frozenset({"01" * 48})}, "allow_simulation": True}
        return Policy(("nitro",), **{**fields, "simulation_roots": (self.root,), **changes})


@pytest.fixture(scope="module")
def cloud() -> Cloud:
    return Cloud()


def test_evidence_of_an_enclave(cloud: Cloud) -> None:
    told = claims().to_dict()
    evidence = Evidence(Quote("nitro", cloud.document(user_data=report_data(told))), told)
    assert Evidence.from_bytes(evidence.to_bytes()) == evidence
    verdict = judge(evidence, cloud.policy(), nonce=NONCE, tls_key=TLS_KEY)
    assert verdict.accepted and verdict.simulation, str(verdict)
    others = Evidence(Quote("nitro", cloud.document()), told)
    assert failed(judge(others, cloud.policy(), nonce=NONCE, tls_key=TLS_KEY)) == ["claims"]
    for strict in ({"allow_simulation": False, "simulation_roots": ()}, {"simulation_roots": ()}):
        assert failed(judge(evidence, cloud.policy(**strict), nonce=NONCE, tls_key=TLS_KEY))[0] == "certificates"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"pcrs": {0: bytes(48), 1: b"\1" * 48}}, "debug"),
        ({"pcrs": {}}, "format"),
        ({"pcrs": {0: b"\1" * 32}}, "format"),
        ({"pcrs": {0: b"\1" * 48, 32: bytes(48)}}, "format"),
        ({"digest": "SHA256"}, "format"),
        ({"user_data": None}, "format"),
        ({"user_data": bytes(63)}, "format"),
        ({"cabundle": []}, "format"),
        ({"cabundle": ["text"]}, "format"),
        ({"cabundle": [b"\x30"] * 9}, "format"),
        ({"more": 1}, "format"),
        ({"user_data": cbor2.CBORTag(35, "a+")}, "format"),
    ],
)
def test_documents_of_another_form_are_refused(cloud: Cloud, changes: Any, rule: str) -> None:
    found = judge_quote(Quote("nitro", cloud.document(**changes)), cloud.policy(measurements={}))
    assert failed(found)[0] == rule, str(found)


def test_chains_that_do_not_hold_are_refused(cloud: Cloud) -> None:
    root, issuer = cloud.bundle
    for bundle in ([root], [issuer], [issuer, root], [root, issuer, issuer]):
        found = judge_quote(Quote("nitro", cloud.document(cabundle=bundle)), cloud.policy(measurements={}))
        assert failed(found)[0] == "certificates", str(found)
    for flawed in (Cloud(issuer_is_authority=False), Cloud(path_length=0)):
        found = judge_quote(Quote("nitro", flawed.document()), flawed.policy(measurements={}))
        assert failed(found)[0] == "certificates", str(found)
    other = Cloud().document()
    parts, theirs = cbor2.loads(cloud.document()), cbor2.loads(other)
    swapped = cbor2.dumps([*parts[:3], theirs[3]])
    assert failed(judge_quote(Quote("nitro", swapped), cloud.policy(measurements={})))[0] == "signature"


def test_other_spellings_of_a_document_are_refused(cloud: Cloud) -> None:
    document = cloud.document()
    tagged = cbor2.dumps(cbor2.CBORTag(18, cbor2.loads(document)))
    bombs = [b"\x84" * 1000, *(head + b"\x7f" + b"\xff" * 7 for head in (b"\x9b", b"\x5b", b"\xbb", b"\x7b"))]
    for data in (tagged, document + b"\0", b"\x9f" + document[1:] + b"\xff", b"", b"\xf6", *bombs):
        with pytest.raises(FormatError):
            module.peek(data)
    assert failed(judge_quote(Quote("nitro", cloud.document(bytes.fromhex("a1012a"))), cloud.policy()))[0] == "format"


@pytest.mark.parametrize("document", [b"\x84\xff\x00\x00\x00", b"\x81\xa1\x00\xff", b"\xff", b"\x84\xf7\xf7\xf7\xf7"])
def test_a_document_that_cbor_cannot_encode_again_is_refused(document: bytes) -> None:
    """A break within a list, which older versions of cbor2 decode; an undefined value."""
    with pytest.raises(FormatError):
        module.peek(document)


def test_a_key_of_another_curve_is_refused() -> None:
    cloud = Cloud(curve=SECP256R1())
    found = judge_quote(Quote("nitro", cloud.document()), cloud.policy(measurements={}))
    assert failed(found)[0] == "certificates"


# Within an enclave: the module's device, played by its documented interface


@pytest.fixture
def device(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file in place of /dev/nsm, and in place of the kernel's call what answers by ``cloud``."""

    def ioctl(handle: int, code: int, message: Any) -> None:
        assert code == 0xC0200A00 and ctypes.sizeof(message) == 32
        request = cbor2.loads(ctypes.string_at(message.request, message.request_bytes))
        assert set(request) == {"Attestation"} and request["Attestation"]["nonce"] is None
        answer = respond(request["Attestation"]["user_data"])
        assert len(answer) <= message.response_bytes
        ctypes.memmove(message.response, answer, len(answer))
        message.response_bytes = len(answer)

    def respond(user_data: bytes) -> bytes:
        return cbor2.dumps({"Attestation": {"document": cloud.document(user_data=user_data)}})

    monkeypatch.setattr(nitro_enclave.fcntl, "ioctl", ioctl)
    path = tmp_path / "nsm"
    path.touch()
    return path


def test_an_enclave_asks_its_module(device: Path, cloud: Cloud) -> None:
    platform = nitro_enclave.NitroPlatform(device)
    assert platform.sealing_key() is None and platform.counter is None and not platform.simulated
    assert platform.measurements() == {"nitro_pcr0": "01" * 48, "nitro_pcr8": "00" * 48}
    found = judge(attest(platform.attester, claims().to_dict()), cloud.policy(), nonce=NONCE, tls_key=TLS_KEY)
    assert found.accepted, str(found)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff",
        cbor2.dumps([]),
        cbor2.dumps({"Error": "InvalidOperation"}),
        cbor2.dumps({"Attestation": {"document": "text"}}),
        cbor2.dumps({"Attestation": []}),
        cbor2.dumps({"Attestation": {"document": b"none"}}),
    ],
)
def test_a_module_that_gives_no_document(answer: bytes, device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(handle: int, code: int, message: Any) -> None:
        ctypes.memmove(message.response, answer, len(answer))
        message.response_bytes = len(answer)

    monkeypatch.setattr(nitro_enclave.fcntl, "ioctl", ioctl)
    with pytest.raises(AttestationError, match="Nitro module"):
        nitro_enclave.NitroAttester(device).quote(bytes(64))


def test_a_module_that_answers_another_and_a_machine_without_one(
    device: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AttestationError, match="other report data"):
        monkeypatch.setattr(cloud, "document", lambda user_data: Cloud.document(cloud, user_data=bytes(64)))
        nitro_enclave.NitroAttester(device).quote(b"\1" * 64)
    monkeypatch.undo()
    with pytest.raises(AttestationError, match="Inappropriate ioctl"):
        nitro_enclave.NitroAttester(device).quote(bytes(64))  # an ordinary file
    with pytest.raises(AttestationError, match="no Nitro module here"):
        open_platform("nitro")
