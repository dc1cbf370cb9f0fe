"""Who may connect to an enclave: a chain of signed changes, which every party reads and checks for itself.

    membership n = who is in it after changes 0 .. n          digest of n = SHA-256(canonical JSON of change n)

What a change says and who must have signed it is in `change`. A membership gives nobody a right to a model or to data:
jobs and terms do, which name identities. Nothing of it is secret.

It begins with who was let in, as who they were then, and with what was stated by then about identities that have ended:
in the operator's directory, or in the chain of an enclave that has handed over. Only who knows that B stands for A can
throw B out when A's owner disputes that, and only who knows of a key that has ended can refuse it under another name.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from obfuscatune.errors import ConsentError, FormatError, SealError
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.change import CONTEXT, MAX_MEMBERS, Act, Change, Member, SignedChange
from obfuscatune.parties.identity import PublicIdentity
from obfuscatune.parties.succession import Succession, read_succession, successors

NO_MEMBERSHIP = "0" * 64
MAX_CHAIN_BYTES = 4 << 20  # of all changes: they are sealed with the enclave's state, at each commit
MAX_SUCCESSIONS = 64  # of one member and its successors: one party alone must not be able to fill the chain


@dataclass(frozen=True)
class Membership:
    """Who is in after a chain of changes.

    Attributes:
        enclave: fingerprint. number, digest: of the last change. origins: who was founded or admitted, and not removed.
        ends: statements of identities about themselves. ever: fingerprints of all who were ever in it.
        size: bytes of the chain. parties_ever: all who were founded or admitted as parties, under the identity of then.
    """

    enclave: str
    number: int
    digest: str
    origins: tuple[Member, ...]
    ends: tuple[Succession, ...] = ()
    ever: frozenset[str] = frozenset()
    size: int = 0
    parties_ever: tuple[PublicIdentity, ...] = ()

    @property
    def members(self) -> tuple[Member, ...]:
        """Who is in it: successors in place of those whom they succeed, nobody in place of who was revoked."""
        found = []
        for member in self.origins:
            identity = resolve(member.identity, self.ends)
            if identity is not None:
                found.append(Member(identity, member.role))
        return tuple({member.identity: member for member in found}.values())

    @property
    def gone(self) -> frozenset[str]:
        """Fingerprints of who was in it, and is in it no more."""
        return self.ever - {member.identity.fingerprint for member in self.members}

    @property
    def left(self) -> frozenset[str]:
        """Fingerprints of who was in it and is in no more, under no later identity either."""
        heirs, here = successors(self.ends), {member.identity.fingerprint for member in self.members}
        found = set()
        for name in self.ever:
            now: str | None = name
            for _ in heirs:
                if now in heirs:
                    heir = heirs[now]
                    now = None if heir is None else heir.fingerprint
            found |= set() if now in here else {name}
        return frozenset(found)

    def member(self, fingerprint: str) -> Member | None:
        """Return the member of a fingerprint."""
        return next((member for member in self.members if member.identity.fingerprint == fingerprint), None)

    def next(self, act: Act, subject: Member | str | bytes) -> Change:
        """Return the change that would come next, to be signed."""
        return Change(self.enclave, self.number + 1, self.digest, act, subject)

    def after(self, signed: SignedChange) -> "Membership":
        """Return the membership after a change, if it is the next one of this chain and signed as it must be.

        Raises:
            ConsentError: of another enclave or another place in the chain, changes nothing, or signatures lack.
            SealError: a signature that is wrong, or of nobody here. FormatError: beyond the limits.
        """
        changed, data = self.applied(signed.change), signed.to_bytes()
        if self.size + len(data) > MAX_CHAIN_BYTES:
            raise FormatError("the chain of memberships is full", expected=f"at most {MAX_CHAIN_BYTES} bytes")
        message = encode(signed.change.to_dict())
        for name, signature in signed.signatures.items():
            member = self.member(name)
            if member is None or not member.identity.verify(signature, CONTEXT, message):
                raise SealError("a signature that is no member's, or not of this change", got=name[:16])
        lack = self.lacking(signed)
        if lack:
            hint = "each who agrees signs it: obfuscatune party agree FILE"
            raise ConsentError("a change of membership lacks signatures", expected=lack, hint=hint)
        return replace(changed, size=self.size + len(data))

    def lacking(self, signed: SignedChange) -> str:
        """Return what lacks of a change's signatures, in words; empty where nothing does."""
        change = signed.change
        if change.act == "succession" or (change.act == "remove" and change.subject in signed.signatures):
            return ""
        members = self.members
        needed = len(members) // 2 + 1
        if len(signed.signatures) < needed:
            return f"{needed} of {len(members)} members (signed by {len(signed.signatures)})"
        removed = self.member(change.subject) if isinstance(change.subject, str) else None
        others = [member for member in members if member != removed]
        for role in {member.role for member in others}:
            if not any(m.role == role and m.identity.fingerprint in signed.signatures for m in others):
                return f"a member who is {'the operator' if role == 'operator' else 'a party'}"
        return ""

    def applied(self, change: Change) -> "Membership":
        """Return the membership after a change, whoever has signed it; raises as :meth:`after`."""
        if change.enclave != self.enclave:
            raise ConsentError("a membership of another enclave", got=change.enclave[:16], expected=self.enclave[:16])
        if (change.number, change.previous) != (self.number + 1, self.digest):
            hint = "it was changed since: make the change anew, and sign it"
            got, expected = f"change {change.number}", f"change {self.number + 1} after {self.digest[:16]}"
            raise ConsentError("not the next change of this membership", got=got, expected=expected, hint=hint)
        origins, ends, ever = self.origins, self.ends, self.parties_ever
        if isinstance(change.subject, Member):
            self._check_newcomer(change.subject.identity)
            origins = (*origins, change.subject)
            if change.subject.role == "party" and change.subject.identity not in self.parties_ever:
                ever = (*ever, change.subject.identity)
        elif isinstance(change.subject, bytes):
            ends = self._ended(change.subject, change.time)
        elif isinstance(change.subject, str):
            if self.member(change.subject) is None:
                raise ConsentError("not a member", got=change.subject[:16])
            kept = [m for m in origins if (now := resolve(m.identity, ends)) and now.fingerprint != change.subject]
            origins = tuple(kept)
        else:
            raise ConsentError("an enclave is founded once")
        changed = replace(self, number=change.number, digest=change.digest, origins=origins, ends=ends)
        changed = replace(changed, parties_ever=ever)
        return replace(changed, ever=self.ever | {member.identity.fingerprint for member in changed.members})

    def _check_newcomer(self, identity: PublicIdentity) -> None:
        members = self.members
        if len(members) >= MAX_MEMBERS:
            raise FormatError("too many members", expected=f"at most {MAX_MEMBERS}")
        if any(member.identity.signing_key == identity.signing_key for member in members):
            what, hint = "already a member, or another name of one", "obfuscatune party members lists them"
            raise ConsentError(what, got=identity.fingerprint[:16], hint=hint)
        # By its signing key here, too: who has stolen one that was revoked would come back under another name.
        if any(identity.signing_key == each.identity.signing_key for each in self.ends):
            raise ConsentError("this identity has ended", got=identity.fingerprint[:16])

    def _ended(self, data: bytes, when: int) -> tuple[Succession, ...]:
        found = read_succession(data)
        ends = (*self.ends, found)
        before, after = self.members, replace(self, ends=ends).members
        known = any((each.identity, each.successor) == (found.identity, found.successor) for each in self.ends)
        # What comes at once after the founding may be about who is not in: see the head of this module.
        begins = before == after and len(self.ends) == self.number and not known
        if before == after and not begins:
            raise ConsentError("a statement that changes nothing here", got=found.identity.fingerprint[:16])
        if found.time > when:
            raise ConsentError("a statement whose time has not come", got=found.identity.fingerprint[:16])
        # By its signing key: another name makes another fingerprint. Nor may one be it whom the successor has named.
        others = {m.identity.signing_key for m in before if m.identity != found.identity}
        heir = resolve(found.identity, ends)
        ended = {each.identity.signing_key for each in self.ends} - {found.identity.signing_key}
        if heir is not None and heir.signing_key in ended:
            what = "the successor is an identity that has ended, under another name"
            raise ConsentError(what, got=f"{heir.name} {heir.fingerprint[:16]}")
        for named in () if begins else (found.successor, heir):
            if named is not None and named.signing_key in others:
                what = "the successor is a member already, or another name of one"
                raise ConsentError(what, got=f"{named.name} {named.fingerprint[:16]}")
        if len(lineage(found.identity, ends)) > MAX_SUCCESSIONS:
            raise FormatError("too many successions of one member", expected=f"at most {MAX_SUCCESSIONS}")
        return ends


def found(enclave: str, members: Iterable[Member], now: float | None = None) -> SignedChange:
    """Return the founding of a membership, which nobody signs; raises FormatError beyond the limits."""
    when = int(time.time() if now is None else now)
    change = Change(enclave, 0, NO_MEMBERSHIP, "found", tuple(members), when)
    return SignedChange(Change.from_dict(change.to_dict()))


def begin(
    enclave: str, members: Iterable[Member], statements: Iterable[tuple[bytes, int]] = ()
) -> tuple[list[SignedChange], Membership]:
    """Return the first changes of a membership, its founding and what was stated by then, and the membership.

    Args:
        members: as who they were let in. statements: each with a time, in Unix seconds, at which it was in effect: the
            clock may have been turned back since then.

    Raises:
        FormatError: beyond the limits. SealError, ConsentError: a statement that no chain takes.
    """
    chain = [found(enclave, members)]
    now = founded(chain[0], enclave)
    for data, when in statements:
        change = now.next("succession", data)
        chain.append(SignedChange(replace(change, time=max(change.time, when))))
        now = now.after(chain[-1])
    return chain, now


def begin_after(enclave: str, chain: Sequence[bytes], before: Membership) -> list[SignedChange]:
    """Return the first changes of an enclave that goes on for another one, whose ``chain`` leads to ``before``.

    The members are the same. The statements are those of that chain, in their order, which has taken them: so none is
    refused here. Who was let in and is in no more, under no later identity either, is left out: nothing brings it back.
    """
    here = [member for member in before.origins if resolve(member.identity, before.ends) is not None]
    changes = [SignedChange.from_bytes(line).change for line in chain]
    statements = [(each.subject, each.time) for each in changes if isinstance(each.subject, bytes)]
    return begin(enclave, here, statements)[0]


def founded(signed: SignedChange, enclave: str) -> Membership:
    """Return the first membership of an enclave; raises ConsentError where it is none."""
    change = signed.change
    first = change.act == "found" and change.number == 0 and change.previous == NO_MEMBERSHIP
    if not first or signed.signatures or not isinstance(change.subject, tuple):
        raise ConsentError("not the beginning of a membership")
    if change.enclave != enclave:
        raise ConsentError("a membership of another enclave", got=change.enclave[:16], expected=enclave[:16])
    ever = frozenset(member.identity.fingerprint for member in change.subject)
    parties = tuple(member.identity for member in change.subject if member.role == "party")
    return Membership(enclave, 0, change.digest, change.subject, (), ever, len(signed.to_bytes()), parties)


def follow(chain: Iterable[bytes], enclave: str, before: Membership | None = None) -> Membership | None:
    """Return the membership after a chain, or after a part of it that follows ``before``; None of nothing at all.

    Raises:
        FormatError, ConsentError, SealError: a change that is none, that does not follow, or that is not signed so.
    """
    now = before
    for line in chain:
        signed = SignedChange.from_bytes(line)
        now = founded(signed, enclave) if now is None else now.after(signed)
    return now


def resolve(identity: PublicIdentity, ends: Iterable[Succession]) -> PublicIdentity | None:
    """Return who an identity is now, by the statements about it; None where it was revoked, or in dispute."""
    heirs = successors(ends)
    current: PublicIdentity | None = identity
    for _ in heirs:  # a chain of successions, which may be a circle
        if current is not None:
            current = heirs.get(current.fingerprint, current)
    return None if current is not None and current.fingerprint in heirs else current


def lineage(identity: PublicIdentity, ends: Iterable[Succession]) -> list[Succession]:
    """Return the statements about an identity, those before it and those after it."""
    related, grown = {identity}, True
    statements = list(ends)
    while grown:
        grown = False
        for each in statements:
            pair = {each.identity} | ({each.successor} if each.successor is not None else set())
            if pair & related and not pair <= related:
                related, grown = related | pair, True
    return [each for each in statements if each.identity in related]
