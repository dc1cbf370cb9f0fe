"""Handing the state over to an enclave of other code: sealed to the key that its evidence proves, once, to one.

    old: judges the new one's evidence by the policy that the owners have signed (`parties.upgrade`)
    old: commits that it is handed over to that key; from here on it changes nothing, and gives the same to the same key
    new: opens it, checks that store and log are there, commits; from here on it serves

    bundle = canonical JSON of {"box", "certificate", "format", "signature"}
    box    = base64 of HPKE(new enclave's identity, state, info = certificate)
    certificate: `upgrade.certify`. signature: of the old enclave, context "hand-over", over SHA-256 of box and of
    certificate

A crash at any point leaves one enclave with the state: before the old one's commit the old, after it the new, which
asks again. The new enclave keeps its own identity, which nobody outside has ever had: the old one's keys open what was
sealed to the old one, and nothing is sealed to them any more. So who hands over a state of his own making gains
nothing.
"""

import base64
import hashlib
import time
from dataclasses import dataclass
from typing import Any

from obfuscatune.errors import ConsentError, FormatError, SealError, UsageError
from obfuscatune.parties.attestation.evidence import Evidence
from obfuscatune.parties.attestation.verify import judge
from obfuscatune.parties.canonical import decode, encode, unbase64
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.membership import begin_after, follow
from obfuscatune.parties.upgrade import Upgrade, certify, read_certificate
from obfuscatune.service.book import Book
from obfuscatune.service.members import chains
from obfuscatune.service.state import MAX_BYTES, State

FORMAT = "obfuscatune hand-over 1"
MAX_BUNDLE_BYTES = 2 * MAX_BYTES
MAX_FORMER = 16  # enclaves in a row that have handed over
_CONTEXT = "hand-over"
NAMES = frozenset({"forgotten", "former", "identity", "jobs", "log_head", "log_length", "members", "uses"})
EARLIER = NAMES - {"forgotten", "uses"}  # of code that counted no jobs


def give(book: Book, statement: bytes, evidence: bytes, *, simulated: bool) -> bytes:
    """Return the state for the enclave of ``evidence``, sealed to it; this enclave ends with that.

    Args:
        book: with the state. statement: an upgrade signed by all who must. evidence: the new enclave's, fresh.
        simulated: whether this enclave runs in a simulator, and may so be succeeded by one.

    Raises:
        ConsentError: not signed by all, of or to another enclave, over; or handed over to another. SealError: a
            signature.
        AttestationError: the policy of the statement does not accept the evidence. FormatError: either is none.
        UsageError: nothing was ever submitted. StorageError: the disk refuses; nothing was handed over.
    """
    upgrade, state = Upgrade.from_bytes(statement), book.state
    policy = upgrade.load_policy()
    if policy.allow_simulation and not simulated:
        raise ConsentError("an upgrade to a simulator, which protects nothing")
    claims = judge(Evidence.from_bytes(evidence), policy).require()
    with state.lock:
        if not state.members:
            raise UsageError("no job was ever submitted: there is nothing to hand over")
        # What was handed over is given again after the statement's end too: nobody could make another one for it.
        again = state.handed == {"statement": upgrade.digest, "to": claims.identity.fingerprint}
        now = upgrade.created if again else time.time()
        upgrade.check([each for each in chains(state) if each is not None], now)
        if upgrade.to not in (None, claims.identity.fingerprint):
            got, expected = claims.identity.fingerprint[:16], f"{upgrade.to}"[:16]
            raise ConsentError("an upgrade to another enclave of that code", got=got, expected=expected)
        if claims.identity == state.identity.public:
            raise UsageError("an enclave cannot be handed over to itself")
        if len(state.former) >= MAX_FORMER:
            raise UsageError("too many upgrades in a row", expected=f"at most {MAX_FORMER}", hint="seal anew")
        if (
            len(encode(state.fields())) > MAX_BYTES // 2
        ):  # or the new enclave could not write it: its chain comes beside
            raise UsageError(
                "the state is too long to be handed over", hint="seal anew, or delete jobs that have ended"
            )
        book.hand_over(claims.identity.fingerprint, upgrade.digest)
        fields = {name: value for name, value in state.fields().items() if name in NAMES}
        return seal_bundle(fields, state.identity, claims.identity, upgrade.digest)


def seal_bundle(fields: dict[str, Any], old: Identity, to: PublicIdentity, statement: str) -> bytes:
    """Return the bundle of a state's fields (but for its identity, which is put in) for one new enclave."""
    certificate = certify(old, to, statement)
    box = to.wrap(encode({**fields, "identity": base64.b64encode(old.to_bytes()).decode()}), certificate)
    signature = old.sign(_CONTEXT, _signed(box, certificate))
    values = {"box": box, "certificate": certificate, "signature": signature}
    return encode({"format": FORMAT, **{name: base64.b64encode(data).decode() for name, data in values.items()}})


@dataclass(frozen=True, repr=False)
class Taken:
    """A state that was handed over to this enclave, opened. Secret; `adopt` makes it this enclave's."""

    fields: dict[str, Any]
    old: Identity
    certificate: bytes

    @property
    def log(self) -> tuple[str, int]:
        """Head and length of the audit log that goes with it."""
        return self.fields["log_head"], self.fields["log_length"]

    def adopt(self, state: State) -> None:
        """Put it into a state that is new; the caller commits.

        Raises:
            ConsentError: this enclave has a state of its own, which it would forget.
        """
        if state.members or state.jobs or state.former:
            raise ConsentError("this enclave has a state of its own", hint="start a new one, with an empty directory")
        old = self.old.public.fingerprint
        chain = [line.encode() for line in self.fields["members"]]
        before = follow(chain, old)
        if before is None:
            raise FormatError("a hand-over without members")
        begun = begin_after(state.identity.public.fingerprint, chain, before)
        former = {
            "certificate": self.certificate.decode(),
            "identity": self.fields["identity"],
            "members": self.fields["members"],
        }
        state.former = [*self.fields["former"], former]
        state.jobs = self.fields["jobs"]
        state.uses, state.forgotten = self.fields.get("uses", {}), self.fields.get("forgotten", 0)
        state.log_head, state.log_length = self.log
        state.members = [each.to_bytes().decode() for each in begun]


def open_bundle(data: bytes, identity: Identity) -> Taken:
    """Return the state of a bundle that is for this enclave.

    Raises:
        FormatError: no bundle. SealError: for another enclave, changed, or not signed by the one that it comes from.
    """
    fields = decode(data, "hand-over", max_bytes=MAX_BUNDLE_BYTES)
    if set(fields) != {"box", "certificate", "format", "signature"} or fields["format"] != FORMAT:
        raise FormatError("hand-over is none", expected=FORMAT)
    names = ("box", "certificate", "signature")
    box, certificate, signature = (unbase64(fields[name], "hand-over") for name in names)
    sender, to = read_certificate(certificate)
    if to != identity.public.fingerprint:
        raise SealError("a hand-over to another enclave", got=to[:16], expected=identity.public.fingerprint[:16])
    if not sender.verify(signature, _CONTEXT, _signed(box, certificate)):
        raise SealError("a hand-over that was changed")
    inner = decode(identity.unwrap(box, certificate), "state that is handed over", max_bytes=MAX_BYTES)
    if set(inner) not in (NAMES, EARLIER):
        raise FormatError("state that is handed over has other fields")
    old = Identity.from_bytes(base64.b64decode(inner["identity"]), "identity that is handed over")
    if old.public != sender:
        raise SealError("a hand-over of another enclave's state")
    return Taken(inner, old, certificate)


def _signed(box: bytes, certificate: bytes) -> bytes:
    return hashlib.sha256(box).digest() + hashlib.sha256(certificate).digest()
