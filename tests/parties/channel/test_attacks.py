"""Who must not get through: replays, relays, foreign keys, old and swapped evidence, strangers; and the controls."""

import base64
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from obfuscatune.errors import AttestationError, ConnectionClosedError, ConsentError, ObfuscatuneError, ProtocolError
from obfuscatune.parties.attestation.evidence import Evidence
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.channel import certificate as certificates
from obfuscatune.parties.channel import connect_attested, fetch_evidence, frames, handshake
from obfuscatune.parties.channel.certificate import fresh_evidence, read_certificate
from obfuscatune.parties.channel.frames import Stream
from obfuscatune.parties.channel.tls import server_context
from obfuscatune.parties.identity import Identity

from .attackers import ANY, Relay, Script, bare_client, certificate_of, forged_certificate, soon, tcp_forwarder, tls_end
from .conftest import Enclave
from .test_frames import reader

CANARY = {"op": "canary"}


def attempt(address: str, client: Identity, policy: Policy, **options: Any) -> None:
    """Connect and send content: what must not be reached."""
    with connect_attested(address, identity=client, policy=policy, timeout=20, **options) as channel:
        channel.request(CANARY, b"canary")


# Control: the channel works, over any cable


def test_an_honest_cable_sees_nothing(enclave: Enclave, owner: Identity, policy: Policy) -> None:
    with tcp_forwarder(enclave.address) as (address, seen):
        with connect_attested(address, identity=owner, policy=policy, timeout=20) as channel:
            assert channel.request(CANARY, b"canary") == ({"echo": CANARY}, b"canary")
            assert channel.enclave == enclave.identity.public
        assert len(seen) > 10_000
        for secret in (b"canary", owner.public.name.encode(), owner.public.signing_key):
            assert secret not in seen
        assert enclave.identity.public.name.encode() not in seen  # TLS 1.3 encrypts the certificate too


# Relays with a key of their own


def relayed(relay: Relay, client: Identity, policy: Policy, match: str) -> None:
    with tls_end(relay.context, relay.run) as address, pytest.raises(AttestationError, match=match):
        attempt(address, client, policy)
    assert relay.sent_types() in ([], ["hello"])


def test_relay_with_a_certificate_without_evidence(enclave: Enclave, owner: Identity, policy: Policy) -> None:
    relayed(Relay(enclave.address, forged_certificate()), owner, policy, "certificate has no evidence")


def test_relay_with_the_true_evidence_in_a_foreign_certificate(
    enclave: Enclave, owner: Identity, policy: Policy
) -> None:
    evidence = read_certificate(certificate_of(enclave.address)).evidence
    relay = Relay(enclave.address, forged_certificate(evidence))
    relayed(relay, owner, policy, "another TLS key than this connection's")
    assert len(relay.from_enclave) == 1  # the enclave's genuine answer did reach the victim


def test_relay_that_writes_its_own_key_into_the_claims(enclave: Enclave, owner: Identity, policy: Policy) -> None:
    own = forged_certificate()
    key = read_key_hash(own)

    def change(number: int, fields: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        evidence = Evidence.from_bytes(payload)
        return fields, Evidence(evidence.quote, {**evidence.claims, "tls_key": key}).to_bytes()

    evidence = read_certificate(certificate_of(enclave.address)).evidence
    lying = Evidence(evidence.quote, {**evidence.claims, "tls_key": key})
    relay = Relay(enclave.address, forged_certificate(lying, key=own.private_key), change)
    relayed(relay, owner, policy, "report data|claims")


def test_relay_with_the_enclaves_own_key_is_the_control(enclave: Enclave, owner: Identity, policy: Policy) -> None:
    """It reads everything: so the refusals above are the evidence's doing, and the recorder sees plain messages."""
    relay = Relay(enclave.address, enclave.server._certificate)
    with tls_end(relay.context, relay.run) as address:
        attempt(address, owner, policy)
    assert relay.sent_types() == ["hello", "authenticate", "request"]
    assert relay.from_victim[2] == ({"fields": CANARY, "id": 1}, b"canary")


def read_key_hash(certificate: Any) -> str:
    return certificates._key_hash(certificate.private_key.public_key())


# Evidence that is old, of another moment, or of another enclave


def replaying(
    enclave: Enclave, answer: Callable[[str], tuple[dict[str, Any], bytes]], heard: list[dict[str, Any]]
) -> Script:
    """A server that has the enclave's own certificate and key, and answers a hello as told."""

    def script(victim: Stream) -> None:
        fields, _ = victim.receive(ANY, deadline=soon())
        heard.append(fields)
        victim.send(*answer(fields["nonce"]), limits=ANY, deadline=soon())
        heard.append(victim.receive(ANY, deadline=soon())[0])

    return script


def refused(enclave: Enclave, client: Identity, policy: Policy, reply: Any, error: type, match: str) -> None:
    heard: list[dict[str, Any]] = []
    script = replaying(enclave, reply if callable(reply) else lambda nonce: reply, heard)
    with tls_end(server_context(enclave.server._certificate), script) as address, pytest.raises(error, match=match):
        attempt(address, client, policy)
    assert [fields["type"] for fields in heard] == ["hello"]  # nothing else was sent


def fresh(enclave: Enclave, nonce: str) -> bytes:
    attester, key = enclave.attester, enclave.server._certificate.tls_key
    return fresh_evidence(enclave.identity.public, attester, key, nonce).to_bytes()


def test_replayed_evidence_of_an_earlier_nonce(enclave: Enclave, owner: Identity, policy: Policy) -> None:
    earlier, _ = fetch_evidence(enclave.address)
    reply = (handshake.evidence_reply("00" * 32), earlier.to_bytes())
    refused(enclave, owner, policy, reply, AttestationError, "not for the nonce that was sent")


def test_the_replaying_server_with_fresh_evidence_is_the_control(
    enclave: Enclave, owner: Identity, policy: Policy
) -> None:
    heard: list[dict[str, Any]] = []
    script = replaying(enclave, lambda nonce: (handshake.evidence_reply("00" * 32), fresh(enclave, nonce)), heard)
    with tls_end(server_context(enclave.server._certificate), script) as address, pytest.raises(ConnectionClosedError):
        connect_attested(address, identity=owner, policy=policy, timeout=20)
    assert [fields["type"] for fields in heard] == ["hello", "authenticate"]


def test_nonce_written_into_replayed_claims(enclave: Enclave, owner: Identity, policy: Policy) -> None:
    earlier, _ = fetch_evidence(enclave.address)

    def reply(nonce: str) -> tuple[dict[str, Any], bytes]:
        lying = Evidence(earlier.quote, {**earlier.claims, "nonce": nonce})
        return handshake.evidence_reply("00" * 32), lying.to_bytes()

    refused(enclave, owner, policy, reply, AttestationError, "report data|claims")


def test_stripped_nonce_round(enclave: Enclave, owner: Identity, policy: Policy) -> None:
    standing = read_certificate(enclave.server._certificate.der).evidence.to_bytes()
    reply = (handshake.evidence_reply("00" * 32), standing)
    refused(enclave, owner, policy, reply, AttestationError, "not for the nonce that was sent")
    refused(enclave, owner, policy, ({"type": "accepted"}, b""), ProtocolError, "not the reply to a hello")
    refused(enclave, owner, policy, (handshake.evidence_reply("00" * 32), b""), AttestationError, "cannot be read")


def test_an_unknown_version_and_texts_of_an_unproved_peer(enclave: Enclave, owner: Identity, policy: Policy) -> None:
    later = ({**handshake.evidence_reply("00" * 32), "version": 2}, b"")
    refused(enclave, owner, policy, later, ProtocolError, "another version of the channel")
    lure = ({"error": "usage", "message": "run this"}, b"")
    refused(enclave, owner, policy, lure, ProtocolError, r"peer refuses the hello(?!.*run this)")


def test_too_much_evidence_is_refused_before_it_is_read(enclave: Enclave, owner: Identity, policy: Policy) -> None:
    reply = (handshake.evidence_reply("00" * 32), bytes(frames.EVIDENCE.payload + 1))
    refused(enclave, owner, policy, reply, ProtocolError, "payload too long")


def test_evidence_of_another_enclave(
    enclave: Enclave, start: Callable[..., Enclave], owner: Identity, policy: Policy
) -> None:
    other = start()

    def reply(nonce: str) -> tuple[dict[str, Any], bytes]:
        return handshake.evidence_reply("00" * 32), fetch_evidence(other.address, nonce=nonce)[0].to_bytes()

    refused(enclave, owner, policy, reply, AttestationError, "another TLS key than this connection's")


def test_one_key_two_identities(enclave: Enclave, owner: Identity, policy: Policy) -> None:
    """The platform's operator has its own program attest another identity for the same TLS key."""
    other, certificate = Identity.generate("other"), enclave.server._certificate

    def reply(nonce: str) -> tuple[dict[str, Any], bytes]:
        evidence = fresh_evidence(other.public, enclave.attester, certificate.tls_key, nonce)
        return handshake.evidence_reply("00" * 32), evidence.to_bytes()

    refused(enclave, owner, policy, reply, AttestationError, "name different identities")


def test_another_enclave_than_the_one_asked_for(enclave: Enclave, owner: Identity, policy: Policy) -> None:
    attempt(enclave.address, owner, policy, enclave=enclave.identity.public.fingerprint)
    with pytest.raises(AttestationError, match="another enclave than the one asked for"):
        attempt(enclave.address, owner, policy, enclave=owner.public.fingerprint)


class Clock:
    """The enclave's clock, which its operator sets."""

    def __init__(self) -> None:
        self.offset = 0.0
        self._time = time.time

    def time(self) -> float:
        return self._time() + self.offset


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(certificates, "time", clock)
    return clock


@pytest.mark.parametrize("days", [-30, 30])
def test_evidence_of_another_day(
    days: int, start: Callable[..., Enclave], owner: Identity, policy: Policy, clock: Clock
) -> None:
    clock.offset = days * 86400
    enclave = start()
    with pytest.raises(AttestationError, match=r"age|issued"):
        attempt(enclave.address, owner, policy)
    clock.offset = 0  # fresh evidence is of today; the certificate's is not
    with pytest.raises(AttestationError, match=r"age|issued"):
        attempt(enclave.address, owner, policy)
    enclave.server._made -= 3600  # the control: a new certificate is due, and with it all is well
    attempt(enclave.address, owner, policy)


def test_simulation_is_refused_by_a_policy_that_does_not_name_it(
    enclave: Enclave, owner: Identity, production: Policy
) -> None:
    with pytest.raises(AttestationError, match=r"simulat|root"):
        attempt(enclave.address, owner, production)
    assert enclave.handled == []


# Strangers at the enclave


def test_unknown_client(enclave: Enclave, policy: Policy) -> None:
    stranger = Identity.generate("owner")  # the same name, other keys
    with pytest.raises(ConsentError, match=f"client is not known.*{stranger.public.fingerprint}"):
        attempt(enclave.address, stranger, policy)
    assert enclave.handled == []


def greet(stream: Stream) -> handshake.Transcript:
    """Go through the nonce round as any client may; the certificate is the genuine one."""
    nonce = "ab" * 32
    stream.send(handshake.hello(nonce), limits=ANY, deadline=soon())
    fields, payload = stream.receive(ANY, deadline=soon())
    digest = handshake.digest(stream._socket.getpeercert(binary_form=True))  # type: ignore[attr-defined]
    return handshake.Transcript(digest, nonce, fields["nonce"], handshake.digest(payload))


def answer_to(stream: Stream, message: dict[str, Any]) -> dict[str, Any]:
    stream.send(message, limits=ANY, deadline=soon())
    return stream.receive(ANY, deadline=soon())[0]


def test_client_signature_of_another_connection(enclave: Enclave, owner: Identity) -> None:
    with bare_client(enclave.address) as stream:
        recorded = handshake.authenticate(owner, greet(stream))
        assert answer_to(stream, recorded) == {"type": "accepted"}  # the control
    with bare_client(enclave.address) as stream:
        greet(stream)
        answer = answer_to(stream, recorded)
        assert answer["error"] == "protocol"
        assert "client's signature is wrong" in answer["message"]
        with pytest.raises(ConnectionClosedError):
            stream.receive(ANY, deadline=soon())


@pytest.mark.parametrize("field", ["certificate", "client_nonce", "server_nonce", "evidence"])
def test_every_part_of_the_transcript_is_signed(field: str, enclave: Enclave, owner: Identity) -> None:
    with bare_client(enclave.address) as stream:
        transcript = greet(stream)
        other = handshake.Transcript(**{**vars(transcript), field: "00" * 32})
        assert answer_to(stream, handshake.authenticate(owner, other))["error"] == "protocol"


def test_signature_of_another_party_or_purpose(enclave: Enclave, owner: Identity) -> None:
    thief = Identity.generate("thief")
    with bare_client(enclave.address) as stream:
        message = handshake.authenticate(thief, greet(stream))
        assert answer_to(stream, {**message, "identity": owner.public.to_dict()})["error"] == "protocol"
    with bare_client(enclave.address) as stream:
        transcript = greet(stream)
        message = handshake.authenticate(owner, transcript)
        signature = owner.sign("job", transcript.to_bytes(owner.public))
        message["signature"] = base64.b64encode(signature).decode()
        assert answer_to(stream, message)["error"] == "protocol"


def test_a_request_before_authentication_is_never_handled(enclave: Enclave) -> None:
    request = {"fields": CANARY, "id": 1}
    with bare_client(enclave.address) as stream:
        assert answer_to(stream, request)["error"] == "protocol"
    with bare_client(enclave.address) as stream:
        greet(stream)
        assert answer_to(stream, request)["error"] == "protocol"
    assert enclave.handled == []


# 1,000 random corruptions of what crosses before authentication


def test_random_corruptions(enclave: Enclave, owner: Identity, policy: Policy) -> None:
    """A changed certificate, fresh evidence or client's message is refused by the client or else by the enclave."""
    rng = random.Random(3)
    nonce, certificate = "cd" * 32, enclave.server._certificate
    payload = fresh(enclave, nonce)
    server_side = handshake.Transcript(handshake.digest(certificate.der), nonce, "ef" * 32, handshake.digest(payload))

    def through(der: bytes, payload: bytes, corrupt: Callable[[bytes], bytes] = bytes) -> None:
        peer = read_certificate(der)
        handshake.judge_enclave(peer, payload, nonce, policy, None)
        transcript = handshake.Transcript(peer.digest, nonce, "ef" * 32, handshake.digest(payload))
        message = frames.encode_message(handshake.authenticate(owner, transcript), b"", ANY)
        fields, _ = frames.read_message(reader(corrupt(message)), frames.AUTHENTICATE)
        assert handshake.read_authenticate(fields, server_side) == owner.public

    through(certificate.der, payload)  # the control
    for number in range(1000):
        kind = number % 3
        with pytest.raises(ObfuscatuneError):
            if kind == 0:
                through(corrupted(certificate.der, rng), payload)
            elif kind == 1:
                through(certificate.der, corrupted(payload, rng))
            else:
                through(certificate.der, payload, lambda message: corrupted(message, rng))


def corrupted(data: bytes, rng: random.Random) -> bytes:
    """Flip a bit, change, cut out or repeat a few bytes, or cut the end off."""
    changed, at = bytearray(data), rng.randrange(len(data))
    match rng.randrange(5):
        case 0:
            changed[at] ^= 1 << rng.randrange(8)
        case 1:
            changed[at] = (changed[at] + rng.randrange(1, 256)) % 256
        case 2:
            del changed[at : at + rng.randrange(1, 9)]
        case 3:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
        case _:
            del changed[at:]
    return bytes(changed)
