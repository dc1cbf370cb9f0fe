"""A change of who may connect to an enclave, and its signatures: one line of the chain of a `Membership`.

    change         = {"act", "enclave", "format", "number", "previous", "subject", "time"}
    signed change  = {"change": {...}, "signatures": {fingerprint of a member: base64 of Ed25519, context "membership"}}

    act         subject                        who must have signed it
    found       [{"identity", "role"}, ...]    nobody: whoever starts the enclave founds it, and each party reads it
    admit       {"identity", "role"}           more than half of the members, and of each role one who is there
    remove      fingerprint                    the one who leaves, alone; or as for admit, without the one removed
    succession  base64 of a statement          whom it is about (`succession`)

``number`` and ``previous`` (digest of the membership before; 64 zeros for the first) bind a change to one place in one
chain of one enclave: it cannot be replayed, kept for later, or used in a fork.
"""

import base64
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from obfuscatune.errors import FormatError
from obfuscatune.parties.canonical import decode, encode, unbase64
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.succession import MAX_BYTES as MAX_STATEMENT_BYTES
from obfuscatune.parties.succession import read_succession
from obfuscatune.parties.vocabulary import is_digest

FORMAT = "obfuscatune membership 1"
MAX_MEMBERS = 64
MAX_CHANGE_BYTES = 256 * 1024  # a founding of 64 identities with ML-KEM keys is half of it
CONTEXT = "membership"  # of the signatures
_NAMES = {"act", "enclave", "format", "number", "previous", "subject", "time"}
Act = Literal["found", "admit", "remove", "succession"]
MemberRole = Literal["party", "operator"]
MEMBER_ROLES: tuple[MemberRole, ...] = get_args(MemberRole)


@dataclass(frozen=True)
class Member:
    """Who may connect; ``operator`` is whoever runs the enclave, and has no share of its room."""

    identity: PublicIdentity
    role: MemberRole = "party"

    def to_dict(self) -> dict[str, Any]:
        """Return the canonical fields."""
        return {"identity": self.identity.to_dict(), "role": self.role}

    @classmethod
    def from_dict(cls, fields: Any) -> "Member":
        """Return the member of canonical fields; raises FormatError."""
        if not isinstance(fields, dict) or set(fields) != {"identity", "role"} or fields["role"] not in MEMBER_ROLES:
            raise FormatError("member of another form", expected=f"identity, and role {' or '.join(MEMBER_ROLES)}")
        return cls(PublicIdentity.from_dict(fields["identity"], "identity of a member"), fields["role"])


@dataclass(frozen=True)
class Change:
    """One change, not signed. ``subject``: members of a founding, a member, a fingerprint, or a statement's bytes."""

    enclave: str
    number: int
    previous: str
    act: Act
    subject: tuple[Member, ...] | Member | str | bytes
    time: int = field(default_factory=lambda: int(time.time()))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form: the name of the membership after it."""
        return hashlib.sha256(encode(self.to_dict())).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the canonical fields."""
        subject: Any = self.subject
        if isinstance(subject, tuple):
            subject = [member.to_dict() for member in subject]
        elif isinstance(subject, Member):
            subject = subject.to_dict()
        elif isinstance(subject, bytes):
            subject = base64.b64encode(subject).decode()
        return {
            "act": self.act,
            "enclave": self.enclave,
            "format": FORMAT,
            "number": self.number,
            "previous": self.previous,
            "subject": subject,
            "time": self.time,
        }

    @classmethod
    def from_dict(cls, fields: Any) -> "Change":
        """Return the change of canonical fields; raises FormatError where one is missing, unknown or wrong."""
        if not isinstance(fields, dict) or set(fields) != _NAMES or fields["format"] != FORMAT:
            raise FormatError("no change of membership of this version", expected=FORMAT)
        act, number, when = fields["act"], fields["number"], fields["time"]
        if act not in get_args(Act):
            raise FormatError("change of membership with an unknown act", expected=", ".join(get_args(Act)))
        if not is_digest(fields["enclave"]) or not is_digest(fields["previous"]):
            raise FormatError("change of membership: enclave or previous", expected="64 hex digits")
        if type(number) is not int or not 0 <= number < 1 << 31 or type(when) is not int or not 0 <= when <= 1 << 48:
            raise FormatError("change of membership: number or time", expected="whole numbers")
        return cls(fields["enclave"], number, fields["previous"], act, _subject(act, fields["subject"]), when)

    def __str__(self) -> str:
        """For people: names, and the first digits of fingerprints."""
        who: list[PublicIdentity | str]
        if isinstance(self.subject, tuple):
            who = [member.identity for member in self.subject]
        elif isinstance(self.subject, bytes):
            found = read_succession(self.subject)
            who = [found.identity] if found.successor is None else [found.identity, "by", found.successor]
        else:
            who = [self.subject.identity if isinstance(self.subject, Member) else self.subject[:16]]
        words = [w if isinstance(w, str) else f"{w.name} ({w.fingerprint[:16]})" for w in who]
        as_operator = isinstance(self.subject, Member) and self.subject.role == "operator"
        return f"{self.act} {' '.join(words) or 'nobody'}{' as operator' if as_operator else ''}"


@dataclass(frozen=True)
class SignedChange:
    """A change with the signatures it has so far, by fingerprint; `Membership.after` verifies them."""

    change: Change
    signatures: Mapping[str, bytes] = field(default_factory=dict)

    def sign(self, identity: Identity) -> "SignedChange":
        """Return it with this identity's signature."""
        signature = identity.sign(CONTEXT, encode(self.change.to_dict()))
        return replace(self, signatures={**self.signatures, identity.public.fingerprint: signature})

    def to_bytes(self) -> bytes:
        """Return the canonical encoding: a file to pass around, and a line of the chain."""
        signatures = {name: base64.b64encode(signature).decode() for name, signature in self.signatures.items()}
        return encode({"change": self.change.to_dict(), "signatures": signatures})

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "change of membership") -> "SignedChange":
        """Return the change of a file; its signatures are not verified. Raises FormatError."""
        fields = decode(data.rstrip(b"\n"), what, max_bytes=MAX_CHANGE_BYTES)
        signatures = fields.get("signatures")
        if set(fields) != {"change", "signatures"} or not isinstance(signatures, dict):
            raise FormatError(f"{what} is none", expected="a change and its signatures")
        if len(signatures) > MAX_MEMBERS or not all(map(is_digest, signatures)):
            raise FormatError(f"{what}: signatures", expected=f"at most {MAX_MEMBERS}, by fingerprint")
        read = {name: unbase64(text, f"{what}: signature") for name, text in signatures.items()}
        if any(len(signature) != 64 for signature in read.values()):
            raise FormatError(f"{what}: a signature that is not of 64 bytes")
        return cls(Change.from_dict(fields["change"]), read)


def _subject(act: Act, value: Any) -> tuple[Member, ...] | Member | str | bytes:
    if act == "found":
        if not isinstance(value, list) or len(value) > MAX_MEMBERS:
            raise FormatError("founding of a membership", expected=f"a list of at most {MAX_MEMBERS} members")
        members = tuple(map(Member.from_dict, value))
        if len({member.identity.signing_key for member in members}) != len(members):
            raise FormatError("founding of a membership with a member twice")
        return members
    if act == "admit":
        return Member.from_dict(value)
    if act == "remove":
        if not is_digest(value):
            raise FormatError("removal of a member", expected="its fingerprint")
        return str(value)
    statement = unbase64(value, "succession of a member")
    if len(statement) > MAX_STATEMENT_BYTES:
        raise FormatError("succession of a member is too long", expected=f"at most {MAX_STATEMENT_BYTES} bytes")
    return statement
