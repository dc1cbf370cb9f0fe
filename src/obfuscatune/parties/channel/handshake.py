"""The nonce round and the client's signature: messages, transcript, and the client's judgement of the enclave.

client                                         enclave
hello {nonce, versions}                   ->
                                          <-   evidence {nonce, version}, fresh evidence as payload
(judges; sends nothing more if it fails)
authenticate {identity, signature}        ->
                                          <-   accepted {members: {number, digest}, or without}
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Any

from obfuscatune.errors import AttestationError, FormatError, ProtocolError
from obfuscatune.parties.attestation.claims import EnclaveClaims
from obfuscatune.parties.attestation.evidence import Evidence, Quote
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.verdict import Verdict
from obfuscatune.parties.attestation.verify import judge
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.channel.certificate import PLATFORM_EXTRAS, PeerCertificate
from obfuscatune.parties.identity import Identity, PublicIdentity

PROTOCOL = "obfuscatune channel 1"
VERSION = 1
CONTEXT = "channel"
_NONCE = re.compile(r"[0-9a-f]{64}")
_MAX_VERSIONS = 16


@dataclass(frozen=True)
class Transcript:
    """What both ends have seen of one connection, all as 64 hex digits. A signature over it is good for that one only.

    Attributes:
        certificate: SHA-256 of the enclave's certificate, so of the TLS key too.
        client_nonce: the client's, which the fresh evidence holds.
        server_nonce: the enclave's; no two connections have the same.
        evidence: SHA-256 of the fresh evidence as it was sent.
    """

    certificate: str
    client_nonce: str
    server_nonce: str
    evidence: str

    def to_bytes(self, client: PublicIdentity) -> bytes:
        """Return the canonical bytes that ``client`` signs."""
        return encode(
            {
                "certificate": self.certificate,
                "client": client.to_dict(),
                "client_nonce": self.client_nonce,
                "evidence": self.evidence,
                "protocol": PROTOCOL,
                "server_nonce": self.server_nonce,
            }
        )


def hello(nonce: str) -> dict[str, Any]:
    """Return the client's first message."""
    return {"nonce": nonce, "type": "hello", "versions": [VERSION]}


def read_hello(fields: dict[str, Any]) -> str:
    """Return the client's nonce; raises ProtocolError on another form, or where no version is common."""
    versions = fields.get("versions")
    if set(fields) != {"nonce", "type", "versions"} or fields["type"] != "hello" or not is_nonce(fields["nonce"]):
        raise ProtocolError("not a hello", expected="nonce, type and versions")
    if not isinstance(versions, list) or len(versions) > _MAX_VERSIONS or not all(type(v) is int for v in versions):
        raise ProtocolError("not a list of versions")
    if VERSION not in versions:
        raise ProtocolError("no common version of the channel", expected=VERSION)
    return str(fields["nonce"])


def evidence_reply(nonce: str) -> dict[str, Any]:
    """Return the fields of the enclave's reply; the fresh evidence is its payload."""
    return {"nonce": nonce, "type": "evidence", "version": VERSION}


def read_evidence_reply(fields: dict[str, Any]) -> str:
    """Return the enclave's nonce; raises ProtocolError on another form or version."""
    if set(fields) != {"nonce", "type", "version"} or fields["type"] != "evidence" or not is_nonce(fields["nonce"]):
        raise ProtocolError("not the reply to a hello", expected="nonce, type and version")
    if type(fields["version"]) is not int or fields["version"] != VERSION:
        raise ProtocolError("another version of the channel", expected=VERSION)
    return str(fields["nonce"])


def authenticate(identity: Identity, transcript: Transcript) -> dict[str, Any]:
    """Return the client's message that says and proves who it is."""
    signature = identity.sign(CONTEXT, transcript.to_bytes(identity.public))
    return {
        "identity": identity.public.to_dict(),
        "signature": base64.b64encode(signature).decode(),
        "type": "authenticate",
    }


def read_authenticate(fields: dict[str, Any], transcript: Transcript) -> PublicIdentity:
    """Return the identity that has signed this connection; whether it may be here is for the caller to say.

    Raises:
        ProtocolError: another form, or a signature of another party or connection.
    """
    if set(fields) != {"identity", "signature", "type"} or fields["type"] != "authenticate":
        raise ProtocolError("not an authentication", expected="identity, signature and type")
    try:
        identity = PublicIdentity.from_dict(fields["identity"], "client's identity")
        text = fields["signature"]
        signature = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except FormatError as error:
        raise ProtocolError(error.what, expected=error.expected) from None
    except ValueError:
        raise ProtocolError("client's signature is not base64") from None
    if base64.b64encode(signature).decode() != text or not identity.verify(
        signature, CONTEXT, transcript.to_bytes(identity)
    ):
        raise ProtocolError("client's signature is wrong", expected="its own, over this connection")
    return identity


def accepted(members: dict[str, Any] | None) -> dict[str, Any]:
    """Return the enclave's last message: under which membership it lets the client in; None while that is open."""
    return {"type": "accepted"} if members is None else {"members": members, "type": "accepted"}


def read_accepted(fields: dict[str, Any]) -> tuple[int, str] | None:
    """Return number and digest of the membership, None while it is open; raises ProtocolError on another form."""
    if fields == {"type": "accepted"}:
        return None
    members = fields.get("members")
    fits = set(fields) == {"members", "type"} and fields["type"] == "accepted" and isinstance(members, dict)
    if not fits or set(members) != {"digest", "number"} or not is_nonce(members["digest"]):  # type: ignore[arg-type, index]
        raise ProtocolError("not an answer to an authentication", expected="accepted")
    if type(members["number"]) is not int or members["number"] < 0:  # type: ignore[index]
        raise ProtocolError("not a number of a membership")
    return members["number"], members["digest"]  # type: ignore[index]


def read_fresh(payload: bytes, certificate: PeerCertificate, nonce: str) -> tuple[Evidence, EnclaveClaims]:
    """Return the fresh evidence and its claims, which name this connection's TLS key and nonce; not judged yet.

    Raises:
        AttestationError: no evidence, or of another key or nonce: replayed, relayed or stripped of its nonce.
    """
    try:
        evidence = Evidence.from_bytes(payload)
        claims = EnclaveClaims.from_dict(dict(evidence.claims))
    except FormatError as error:
        raise AttestationError(f"fresh evidence cannot be read: {error.what}") from None
    if claims.tls_key != certificate.tls_key:
        hint = "somebody between the enclave and you ends the TLS connection"
        raise AttestationError("evidence is for another TLS key than this connection's", hint=hint)
    if claims.nonce != nonce:
        raise AttestationError("evidence is not for the nonce that was sent", hint="it was made before: a replay")
    return evidence, claims


def judge_enclave(
    certificate: PeerCertificate, payload: bytes, nonce: str, policy: Policy, enclave: str | None
) -> Verdict:
    """Judge the certificate's evidence and the fresh one, and return the verdict on the fresh one: accepted.

    Args:
        certificate: of this connection.
        payload: the fresh evidence as received.
        nonce: the one that the client has sent on this connection.
        policy: the client's.
        enclave: fingerprint of the only identity to accept; None accepts any that the policy does.

    Raises:
        AttestationError: what failed.
    """
    fresh, claims = read_fresh(payload, certificate, nonce)
    standing = certificate.evidence.quote
    # Untrusted until verified wherever they come from, so they may as well come with the fresh evidence.
    borrowed = {name: data for name, data in fresh.quote.extras.items() if name in PLATFORM_EXTRAS}
    quote = Quote(standing.kind, standing.quote, {**borrowed, **standing.extras})
    standing_verdict = judge(
        Evidence(quote, certificate.evidence.claims), policy, nonce="", tls_key=certificate.tls_key
    )
    standing_claims = standing_verdict.require()
    verdict = judge(fresh, policy, nonce=nonce, tls_key=certificate.tls_key)
    verdict.require()
    if standing_claims.identity != claims.identity:
        raise AttestationError("certificate and fresh evidence name different identities")
    if enclave is not None and claims.identity.fingerprint != enclave:
        raise AttestationError(
            "another enclave than the one asked for", got=claims.identity.fingerprint, expected=enclave
        )
    return verdict


def digest(data: bytes) -> str:
    """Return SHA-256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def is_nonce(value: Any) -> bool:
    """Return whether ``value`` is 32 bytes as 64 hex digits."""
    return isinstance(value, str) and _NONCE.fullmatch(value) is not None
