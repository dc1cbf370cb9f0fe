"""Who may connect, at the enclave's end: founded by the operator's directory, changed by what the members have signed.

Until the first job of two who are in, the membership is open: whoever has a ``.pub`` in the operator's directory is in,
read anew for each request. Then it is founded as it is, with the statements that are in effect there (``.succession``),
logged, and sealed with the state; from there on the directory gives nobody anything. Only statements of members about
themselves are still taken from it, as from any member.
"""

import logging
import time
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from obfuscatune.errors import ConsentError, FormatError, ObfuscatuneError, StorageError, UsageError
from obfuscatune.parties.change import Member, SignedChange
from obfuscatune.parties.files import read_small
from obfuscatune.parties.identity import PublicIdentity
from obfuscatune.parties.membership import Membership, begin, follow, lineage, resolve
from obfuscatune.parties.succession import MAX_BYTES, SUFFIX, Succession, read_succession, successors
from obfuscatune.service.state import State

logger = logging.getLogger(__name__)
_LOOK_SECONDS = 0.2  # between two looks at the operator's directory, which each request could cause
_MAX_PAGE = 1 << 20  # bytes of the chain in one reply


class Members:
    """The membership of an enclave. Every method may be called from several threads.

    Args:
        state: where it is kept, under its lock. directory: of the operator. operator: who the operator is, if known.

    Attributes:
        note: writes an entry of the log and commits the state: ``note(event, party=..., **details)``.
        removed: called with the fingerprints of who is in no more, once that is committed.
    """

    def __init__(self, state: State, directory: Path, operator: PublicIdentity | None = None) -> None:
        self._state, self._directory, self._operator = state, directory, operator
        self._before: list[Membership] = []  # of enclaves that have handed over to this one
        self._left: frozenset[str] = frozenset()
        self._names: dict[str, frozenset[str]] = {}
        self._seen: set[tuple[str, int, int]] = set()  # files of statements that were looked at
        self._now: Membership | None
        self._allowed: frozenset[PublicIdentity] = frozenset()
        self._looked = -_LOOK_SECONDS
        self.note: Callable[..., None] = lambda event, **details: None
        self.removed: Callable[[frozenset[str]], None] = lambda fingerprints: None
        self.load()

    def load(self) -> None:
        """Take up what the state holds. Raises as `follow`, which its seal excludes."""
        with self._state.lock:
            *before, now = chains(self._state)
            self._before = [each for each in before if each is not None]
            self._set(now)

    @property
    def current(self) -> tuple[Member, ...]:
        """Who is in now. Needs no lock: a piece of an upload is counted by it, and waits for nobody's commit."""
        now = self._now
        return self._open() if now is None else now.members

    @property
    def founded(self) -> Membership | None:
        """The membership; None while it is open."""
        return self._now

    def allows(self, identity: PublicIdentity) -> bool:
        """Return whether an identity is in now."""
        if self._now is None:
            return any(member.identity == identity for member in self.current)
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self.refresh()
        return identity in self._allowed

    def parties(self) -> list[str]:
        """Return the fingerprints of those who share the room: all but the operator."""
        return [member.identity.fingerprint for member in self.current if member.role == "party"]

    def strangers(self) -> Container[str]:
        """Return the fingerprints of whom no job may be.

        The operator, who founds no membership; and all who are not in, or while it is open, those that have ended.
        """
        with self._state.lock:
            operators = frozenset(each.identity.fingerprint for each in self.current if each.role == "operator")
            if self._now is not None:
                return _AllBut(frozenset(identity.fingerprint for identity in self._allowed) - operators)
            ended = (each.identity.fingerprint for each in load_statements(self._directory).values())
            return operators | frozenset(ended)

    def left(self) -> frozenset[str]:
        """Return the fingerprints of who was in and is in no more, under no later identity either."""
        return self._left

    def names(self, party: str) -> frozenset[str]:
        """Return a fingerprint and those of the identities that it has succeeded, at once or one after the other.

        Each of these has signed who succeeds it, so what was its own is its successor's.
        """
        return self._names.get(party, frozenset()) | {party}

    def told(self) -> dict[str, Any] | None:
        """Return number and digest for the channel's handshake; None while it is open."""
        now = self._now
        return None if now is None else {"digest": now.digest, "number": now.number}

    def lines(self, start: int) -> tuple[dict[str, Any], bytes]:
        """Return changes from number ``start`` on, one a line, as many as fit; while it is open, how it would begin.

        Raises:
            UsageError: no number of a change.
        """
        with self._state.lock:
            chain = [line.encode() for line in self._state.members]
            is_open = not chain
            if is_open:
                chain = [each.to_bytes() for each in self._founding()[0]]
        if not 0 <= start <= len(chain):
            raise UsageError("change of the membership", got=start, expected=f"0 to {len(chain)}")
        page = b""
        for line in chain[start:]:
            if page and len(page) + len(line) >= _MAX_PAGE:
                break
            page += line + b"\n"
        return {"changes": len(chain), "open": int(is_open)}, page

    def found(self) -> None:
        """Close the membership as it is, if it is open: from now on it changes by what its members sign.

        Raises:
            StorageError: the disk refuses; it is as it was.
        """
        with self._state.lock:
            if self._now is None:
                self._take(*self._founding(), None)

    def change(self, data: bytes, party: PublicIdentity) -> dict[str, Any]:
        """Make a signed change; return number and digest after it. A change that was made already does nothing.

        Raises:
            FormatError, ConsentError, SealError: as `Membership.after`. StorageError: the disk refuses.
        """
        signed = SignedChange.from_bytes(data)
        with self._state.lock:
            before = self._require_founded()
            if signed.change.act in ("found", "succession"):
                raise ConsentError("a change that is not made so", got=signed.change.act)
            if signed.change.digest != before.digest:  # else handed in twice: the first reply was lost
                self._take([signed], before.after(signed), party.fingerprint)
                self._tell(before)
            return self.told() or {}

    def succeed(self, data: bytes, party: PublicIdentity | None = None) -> dict[str, Any]:
        """Take a member's statement about itself; return number and digest after it.

        Raises:
            FormatError, SealError: no statement. ConsentError: of nobody here, or its time has not come.
        """
        with self._state.lock:
            before = self._require_founded()
            signed = SignedChange(before.next("succession", data.rstrip(b"\n")))
            after = before.after(signed)
            if after.members == before.members:  # a chain takes that at its beginning, and from nobody but the enclave
                raise ConsentError("a statement that changes nothing here", got=_subject_of(signed)["subject"][:16])
            self._take([signed], after, None if party is None else party.fingerprint)
            self._tell(before)
            return self.told() or {}

    def refresh(self) -> None:
        """Take new statements from the directory; what is none, or changes nothing, is passed over."""
        with self._state.lock:
            if self._now is None:
                return
            for path in sorted(self._directory.glob(f"*{SUFFIX}")):
                try:
                    status = path.stat()
                    key = (path.name, status.st_mtime_ns, status.st_size)
                    if key in self._seen or not path.is_file():
                        continue
                    data = read_small(path, MAX_BYTES, "succession")
                    if read_succession(data).time > time.time():
                        continue  # an expiry, looked at again
                    self.succeed(data)
                    self._seen.add(key)
                except ConsentError as error:  # of nobody who is in now
                    self._seen.add(key)
                    logger.info("%s changes nothing: %s", path.name, error.what)
                except StorageError as error:  # the next look tries again
                    logger.warning("%s", error)
                except (OSError, UsageError) as error:
                    _skip(path, error)

    @property
    def _enclave(self) -> str:
        return self._state.identity.public.fingerprint

    def _open(self) -> tuple[Member, ...]:
        return self._with_operator(Member(identity) for identity in load_parties(self._directory))

    def _with_operator(self, parties: Iterable[Member]) -> tuple[Member, ...]:
        if self._operator is None:
            return tuple(parties)
        return (Member(self._operator, "operator"), *(each for each in parties if each.identity != self._operator))

    def _require_founded(self) -> Membership:
        if self._now is None:
            hint = "until the first job the operator's directory says who is in"
            raise ConsentError("the membership is not closed yet", hint=hint)
        return self._now

    def _founding(self) -> tuple[list[SignedChange], Membership]:
        """Return how it begins as it is now, and the membership: with what is stated about who is let in, too.

        Where no chain takes a statement, nobody of its line is let in. If all statements were dropped then, a thief
        could write one that contradicts another, and would be in for good.
        """
        let_in, stated = _let_in(self._directory)
        # The operator is named apart, and its own statement here changes nothing: its successor is in as itself.
        let_in = {now: now if party == self._operator else party for now, party in let_in.items()}
        stated = {data: each for data, each in stated.items() if each.identity != self._operator}
        while True:
            chain, now = begin(self._enclave, self._with_operator(map(Member, let_in.values())))
            refused = b""
            try:
                for refused in stated:
                    chain.append(SignedChange(now.next("succession", refused)))
                    now = now.after(chain[-1])
            except (ConsentError, FormatError) as error:
                _skip(self._directory / f"*{SUFFIX}", error)
            else:
                return chain, now
            about = lineage(stated[refused].identity, stated.values())
            line = {each.identity for each in about} | {each.successor for each in about}
            let_in = {now: party for now, party in let_in.items() if not {now, party} & line}
            del stated[refused]

    def _take(self, chain: list[SignedChange], after: Membership, party: str | None) -> None:
        """Log, seal and make changes, in one entry: the entry first; where the disk refuses, it is as it was.

        Raises FormatError for a party that nothing can be sealed to: no share of an escrow either. Before the entry,
        since each try of a party that hands such a change in would be one.
        """
        for identity in (member.identity for member in after.members if member.role == "party"):
            if not identity.can_be_sealed_to:
                raise FormatError("a member with a sealing key that is none", got=identity.fingerprint[:16])
        before = self._state.members
        self._state.members = [*before, *(each.to_bytes().decode() for each in chain)]
        try:
            self.note(
                "membership",
                party=party,
                act=chain[0].change.act,
                number=after.number,
                digest=after.digest,
                members=len(after.members),
                **_subject_of(chain[0]),
            )
        except BaseException:
            self._state.members = before
            raise
        self._set(after)
        for signed in chain:
            logger.info("membership %d: %s", signed.change.number, signed.change)

    def _set(self, now: Membership | None) -> None:
        self._allowed = frozenset() if now is None else frozenset(member.identity for member in now.members)
        every = [*self._before, *([] if now is None else [now])]
        here = frozenset(identity.fingerprint for identity in self._allowed)
        self._left = frozenset().union(*(each.left for each in every)) - here
        self._names = _succeeded(every)
        self._now = now
        self._seen.clear()  # a statement may be about who came in just now

    def _tell(self, before: Membership) -> None:
        if self._now is not None and (left := self._now.gone - before.gone):
            self.removed(left)


def _succeeded(memberships: Sequence[Membership]) -> dict[str, frozenset[str]]:
    """Return for each successor the fingerprints of those that it stands for."""
    heirs: dict[str, PublicIdentity | None] = {}
    for each in memberships:
        heirs |= successors(each.ends)
    found: dict[str, set[str]] = {}
    for name in heirs:
        heir = heirs[name]
        for _ in heirs:  # a chain of successions, which may be a circle
            if heir is not None:
                found.setdefault(heir.fingerprint, set()).add(name)
                heir = heirs.get(heir.fingerprint)
    return {heir: frozenset(names) for heir, names in found.items()}


def chains(state: State) -> list[Membership | None]:
    """Return the memberships of the enclaves that have handed over, oldest first, and this one's: None while open."""
    found = []
    for identity, lines in [
        *zip(state.former_identities, (each["members"] for each in state.former), strict=True),
        (state.identity, state.members),
    ]:
        found.append(follow([line.encode() for line in lines], identity.public.fingerprint))
    return found


def _subject_of(signed: SignedChange) -> dict[str, str]:
    subject = signed.change.subject
    if isinstance(subject, Member):
        return {"subject": subject.identity.fingerprint, "role": subject.role}
    if isinstance(subject, bytes):
        return {"subject": read_succession(subject).identity.fingerprint}
    return {"subject": subject} if isinstance(subject, str) else {}


def load_parties(directory: Path) -> list[PublicIdentity]:
    """Return the identities of a directory's ``.pub`` files, without those that have ended, and their successors.

    A file that is none is named in the log of the process and passed over: it must not shut out the others.

    Raises:
        UsageError: it cannot be read.
    """
    return list(_let_in(directory)[0])


def _let_in(directory: Path) -> tuple[dict[PublicIdentity, PublicIdentity], dict[bytes, Succession]]:
    """Return who is in, each with the identity that let it in, its own if that is there; and what is stated of those.

    Raises as `load_parties`.
    """
    if not directory.is_dir():
        raise UsageError("no such directory of parties", where=str(directory), hint="put their NAME.pub files there")
    ends = load_statements(directory)
    found: dict[PublicIdentity, PublicIdentity] = {}
    named: set[PublicIdentity] = set()
    for path in sorted(directory.iterdir()):
        if path.suffix != ".pub":
            if path.suffix != SUFFIX and not path.name.startswith("."):
                _skip(path, UsageError("no NAME.pub"))
            continue
        try:
            if not path.is_file():  # to open a pipe would wait for ever
                raise UsageError("not a file")
            public = PublicIdentity.load(path)
            named.add(public)
            current = resolve(public, ends.values())
            if current is not None and not current.can_be_sealed_to:
                raise UsageError("a sealing key that is none")
        except (UsageError, OSError) as error:
            _skip(path, error)
            continue
        if current is not None and (current not in found or public == current):
            found[current] = public
    while more := {each.successor for each in ends.values() if each.successor and each.identity in named} - named:
        named |= more
    once = {(each.identity, each.successor): data for data, each in ends.items() if each.identity in named}
    return found, {data: ends[data] for data in once.values()}


def load_statements(directory: Path) -> dict[bytes, Succession]:
    """Return the statements of a directory's ``.succession`` files that are in effect, by their encoding.

    One that is none is named and passed over.
    """
    found = {}
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            if not path.is_file():
                raise UsageError("not a file")
            data = read_small(path, MAX_BYTES, "succession").rstrip(b"\n")
            statement = read_succession(data, f"succession {path}")
        except (UsageError, OSError) as error:
            _skip(path, error)
            continue
        if statement.time <= time.time():
            found[data] = statement
    return found


class _AllBut(Container[str]):
    def __init__(self, here: frozenset[str]) -> None:
        self._here = here

    def __contains__(self, fingerprint: object) -> bool:
        return fingerprint not in self._here


_skipped: set[tuple[str, str]] = set()


def _skip(path: Path, error: Exception) -> None:
    """Name a file that is passed over, once for each fault of it: the directory is read for each request."""
    reason = error.what if isinstance(error, ObfuscatuneError) else type(error).__name__
    if (str(path), reason) not in _skipped and len(_skipped) < 1000:
        _skipped.add((str(path), reason))
        logger.warning("passed over: %s: %s", path, reason)
