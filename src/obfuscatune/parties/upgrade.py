"""An upgrade: which other code an enclave may hand its state over to, signed by all whose files it could open.

    canonical JSON of {"signatures": {fingerprint: base64, ...}, "upgrade": {"created", "enclave", "expires", "files",
    "format", "policy", "to"}}

``policy`` is the text of a policy (`attestation.policy`), ``files`` the files that it names, in base64, by name: what
the old enclave judges the new one's evidence by. ``to`` is the fingerprint of the one new enclave that may have it, or
is left out: then any enclave of that code may, wherever it runs, and whoever of the parties brings it first decides.
Each signs, for context "upgrade", the canonical form of "upgrade".

And a certificate, by which an enclave that has handed over names the one that goes on; parties verify it before they
take the new one for the old one:

    canonical JSON of {"format", "from": public identity, "signature": .., "statement": digest, "to": fingerprint}

signed by the old enclave's identity for context "handed over". Nothing of either is secret.
"""

import base64
import hashlib
import re
import tempfile
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from obfuscatune.errors import ConsentError, FormatError, SealError, UsageError
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.canonical import decode, encode, unbase64
from obfuscatune.parties.change import MAX_MEMBERS
from obfuscatune.parties.files import read_small
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.membership import Membership, resolve
from obfuscatune.parties.vocabulary import is_digest

FORMAT = "obfuscatune upgrade 1"
CERTIFICATE_FORMAT = "obfuscatune handed over 1"
MAX_BYTES = 1 << 20
MAX_DAYS = 3650
MAX_CERTIFICATE_BYTES = 16_384
SHARE_BYTES = 32  # of a key that all parties release together
_CONTEXT, _CERTIFICATE_CONTEXT = "upgrade", "handed over"
_MAX_POLICY_BYTES, _MAX_FILES = 65_536, 8
_FIELDS = {"created", "enclave", "expires", "files", "format", "policy"}
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Upgrade:
    """``enclave`` (fingerprint) may hand its state over to code that ``policy`` accepts, until ``expires``.

    Attributes:
        to: fingerprint of the one enclave that may have it; None: any that the policy accepts.
    """

    enclave: str
    policy: str
    files: Mapping[str, bytes]
    created: int
    expires: int
    signatures: Mapping[str, bytes] = field(default_factory=dict)
    to: str | None = None

    @classmethod
    def make(cls, enclave: str, policy: Path, *, days: float = 30.0, to: str | None = None) -> "Upgrade":
        """Return the statement that an enclave may be succeeded by what a policy file accepts, not signed yet.

        Raises:
            UsageError: no policy, one that pins no code, or one that names a file elsewhere than beside it.
        """
        Policy.load(policy)
        text, now = read_small(policy, _MAX_POLICY_BYTES, "policy").decode(), int(time.time())
        here = {name: policy.parent / name for name in _words(text) if (policy.parent / name).is_file()}
        files = {name: read_small(path, MAX_BYTES // 2, "file of the policy") for name, path in here.items()}
        upgrade = cls(enclave, text, files, now, now + int(days * 86_400), to=to)
        upgrade.load_policy()
        return cls.from_bytes(upgrade.to_bytes())

    @property
    def digest(self) -> str:
        """SHA-256 of what is signed."""
        return hashlib.sha256(encode(self._fields())).hexdigest()

    def load_policy(self) -> Policy:
        """Return the policy, read as from its file.

        Raises:
            FormatError: it is none, accepts any code at all, or names a file that is not in the statement.
        """
        for word in _words(self.policy):
            if "/" in word or "\\" in word:  # else it would be read from the disk of whoever reads the statement
                hint = "put the files that it names beside the policy, and name them without a path"
                raise FormatError("policy of an upgrade names a path", hint=hint)
        with tempfile.TemporaryDirectory(prefix="obfuscatune-policy.") as name:
            path = Path(name) / ".policy.toml"  # as none of the files can be called: one would take its place
            path.write_text(self.policy, encoding="utf-8")
            for each, data in self.files.items():
                (path.parent / each).write_bytes(data)
            try:
                policy = Policy.load(path)
            except UsageError as error:
                raise FormatError("policy of an upgrade", got=error.what) from None
        if policy.any_measurement or not all(policy.pins(kind) for kind in policy.kinds):
            raise FormatError("policy of an upgrade", got="any code", expected="measurements of the new code")
        return policy

    def sign(self, identity: Identity) -> "Upgrade":
        """Return the statement with this identity's signature."""
        signature = identity.sign(_CONTEXT, encode(self._fields()))
        return replace(self, signatures={**self.signatures, identity.public.fingerprint: signature})

    def check(self, memberships: Sequence[Membership], now: float) -> None:
        """Check that all have signed who must: every party that ever was a member, under the identity of now.

        Not only those who are in now: the enclave's key opens what all of them have sealed to it, and the operator may
        have kept copies. The operator itself need not sign.

        Args:
            memberships: the enclave's, and before it those of the enclaves that have handed over to it.
            now: Unix seconds.

        Raises:
            ConsentError: of another enclave, over, or signatures lack. SealError: one is wrong, or of nobody here.
        """
        if self.enclave != memberships[-1].enclave:
            got, expected = self.enclave[:16], memberships[-1].enclave[:16]
            raise ConsentError("an upgrade of another enclave", got=got, expected=expected)
        self.check_term(now)
        known = {each.fingerprint: each for each in signers(memberships).values() if each is not None}
        message = encode(self._fields())
        for name, signature in self.signatures.items():
            if name not in known or not known[name].verify(signature, _CONTEXT, message):
                what, hint = "a signature that is no party's, or not of this upgrade", "make it anew, for parties alone"
                raise SealError(what, got=name[:16], hint=f"{hint}: obfuscatune party upgrade")
        lacking = self.lacking(memberships)
        if lacking:
            hint = "who does not sign seals anew, to the new enclave"
            raise ConsentError("an upgrade lacks signatures", expected=f"of {', '.join(lacking)}", hint=hint)

    def check_term(self, now: float) -> None:
        """Raise ConsentError where it is over, or not of this time yet; ``now`` in Unix seconds."""
        if not self.created - 3600 <= now < self.expires:
            raise ConsentError("the upgrade has expired", hint="make it anew, and let all sign it")

    def lacking(self, memberships: Sequence[Membership]) -> list[str]:
        """Return the names of parties whose signatures lack."""
        needed = signers(memberships).items()
        return [party.name for party, now in needed if now is None or now.fingerprint not in self.signatures]

    def to_bytes(self) -> bytes:
        """Return the canonical encoding."""
        signatures = {name: base64.b64encode(signature).decode() for name, signature in self.signatures.items()}
        return encode({"signatures": signatures, "upgrade": self._fields()})

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "upgrade") -> "Upgrade":
        """Return the statement of a file; nothing of it is verified. Raises FormatError."""
        outer = decode(data.rstrip(b"\n"), what, max_bytes=MAX_BYTES)
        fields, signatures = outer.get("upgrade"), outer.get("signatures")
        if set(outer) != {"signatures", "upgrade"} or not isinstance(fields, dict) or set(fields) - {"to"} != _FIELDS:
            raise FormatError(f"{what} is none", expected=FORMAT)
        if "to" in fields and not is_digest(fields["to"]):
            raise FormatError(f"{what}: the new enclave", expected="64 hex digits")
        if fields.get("to") == fields["enclave"]:
            raise FormatError(
                f"{what}: the new enclave is the old one", expected="the new enclave, started with --take_over"
            )
        if fields["format"] != FORMAT or not is_digest(fields["enclave"]) or type(fields["policy"]) is not str:
            raise FormatError(f"{what} of another form", expected=FORMAT)
        times = (fields["created"], fields["expires"])
        if not all(type(each) is int and 0 <= each <= 1 << 48 for each in times) or times[1] <= times[0]:
            raise FormatError(f"{what}: times", expected="Unix seconds")
        if times[1] - times[0] > MAX_DAYS * 86_400:
            got = f"{(times[1] - times[0]) // 86_400} days"
            raise FormatError(f"{what}: its term", got=got, expected=f"at most {MAX_DAYS} days")
        if len(fields["policy"]) > _MAX_POLICY_BYTES:
            raise FormatError(f"{what}: policy", expected=f"at most {_MAX_POLICY_BYTES} characters")
        files = fields["files"]
        if not isinstance(files, dict) or len(files) > _MAX_FILES or not all(map(_FILE_NAME.fullmatch, files)):
            raise FormatError(f"{what}: files", expected=f"at most {_MAX_FILES}, by plain names")
        if not isinstance(signatures, dict) or len(signatures) > 2 * MAX_MEMBERS or not all(map(is_digest, signatures)):
            raise FormatError(f"{what}: signatures", expected="by fingerprint")
        return cls(
            enclave=fields["enclave"],
            policy=fields["policy"],
            files={name: unbase64(text, f"{what}: a file") for name, text in files.items()},
            created=times[0],
            expires=times[1],
            signatures={name: unbase64(text, f"{what}: a signature") for name, text in signatures.items()},
            to=fields.get("to"),
        )

    def _fields(self) -> dict[str, Any]:
        return {
            "created": self.created,
            "enclave": self.enclave,
            "expires": self.expires,
            "files": {name: base64.b64encode(data).decode() for name, data in self.files.items()},
            "format": FORMAT,
            "policy": self.policy,
            **({} if self.to is None else {"to": self.to}),
        }


def certify(old: Identity, new: PublicIdentity, statement: str) -> bytes:
    """Return the certificate by which an enclave that has handed over names the one that goes on."""
    fields = {
        "format": CERTIFICATE_FORMAT,
        "from": old.public.to_dict(),
        "statement": statement,
        "to": new.fingerprint,
    }
    signature = old.sign(_CERTIFICATE_CONTEXT, encode(fields))
    return encode({**fields, "signature": base64.b64encode(signature).decode()})


def read_certificate(data: bytes) -> tuple[PublicIdentity, str]:
    """Return who has handed over, and the fingerprint of the enclave that goes on.

    Raises:
        FormatError: no certificate. SealError: not signed by the one that has handed over.
    """
    fields = decode(data, "certificate of a hand-over", max_bytes=MAX_CERTIFICATE_BYTES)
    names = {"format", "from", "signature", "statement", "to"}
    if set(fields) != names or fields["format"] != CERTIFICATE_FORMAT or not is_digest(fields["to"]):
        raise FormatError("certificate of a hand-over is none", expected=CERTIFICATE_FORMAT)
    old = PublicIdentity.from_dict(fields["from"], "enclave that has handed over")
    signature = unbase64(fields.pop("signature"), "certificate of a hand-over")
    if not old.verify(signature, _CERTIFICATE_CONTEXT, encode(fields)):
        raise SealError("certificate of a hand-over is not signed by the enclave that it names")
    return old, str(fields["to"])


def goes_on(certificates: Iterable[bytes], old: str, new: str) -> bool:
    """Return whether these certificates lead from one enclave to another, by fingerprints. Raises as above."""
    steps = {found.fingerprint: to for found, to in map(read_certificate, certificates)}
    for _ in steps:
        old = steps.get(old, old)
    return old == new


def signers(memberships: Sequence[Membership]) -> dict[PublicIdentity, PublicIdentity | None]:
    """Return under which identity now each party that ever was a member must sign; None where it cannot any more."""
    ends = [each for membership in memberships for each in membership.ends]
    return {party: resolve(party, ends) for membership in memberships for party in membership.parties_ever}


def share_info(enclave: str, party: str) -> bytes:
    """Return what binds a party's share of an enclave's state (`service.escrow`) to both, by fingerprints."""
    return encode({"enclave": enclave, "format": "obfuscatune escrow share 1", "party": party})


def _words(text: str) -> set[str]:
    """Return all strings that are values in a TOML text; raises FormatError where it is none."""
    try:
        pending: list[Any] = [tomllib.loads(text)]
    except (ValueError, RecursionError):
        raise FormatError("policy of an upgrade is not TOML") from None
    found: set[str] = set()
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str):
            found.add(item)
    return found
