"""How a party reaches an enclave: judged by its policy, compared with what it knows; who is in, and which goes on."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

from obfuscatune.errors import (
    AttestationError,
    BusyError,
    ConnectionClosedError,
    ConsentError,
    ObfuscatuneError,
    ProtocolError,
    RollbackError,
    StorageError,
    UsageError,
)
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.verdict import Verdict
from obfuscatune.parties.attestation.verify import judge
from obfuscatune.parties.change import Act, Member, SignedChange
from obfuscatune.parties.channel.client import AttestedChannel, connect_attested, fetch_evidence
from obfuscatune.parties.channel.transfer import download, upload
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.known import Members, compare, members_of
from obfuscatune.parties.membership import Membership
from obfuscatune.parties.upgrade import Upgrade, goes_on, read_certificate, share_info
from obfuscatune.parties.vocabulary import is_digest

MAX_BUNDLE_BYTES = 32 << 20  # of a state that is handed over


class NotTakenError(ObfuscatuneError):
    """The old enclave has handed over, and the new one has not taken it yet: it lacks what it says. Ask again."""


@dataclass(frozen=True)
class Reached:
    """The enclave at an address, for one party: judged, compared with what is known of it, asked who is in.

    Args:
        address: ``tls://HOST:PORT``. policy: what this party takes for an enclave. identity: the party's.
        timeout: seconds for a connection, and for each reply. folder: where this party keeps what it has seen of the
            enclave's membership, which each connection is compared with; None: not compared.
    """

    address: str
    policy: Policy
    identity: Identity
    timeout: float = 60.0
    folder: Path | None = None

    def verify(self) -> Verdict:
        """Fetch fresh evidence and judge it, without saying who asks. Raises as `fetch_evidence`."""
        return verify_at(self.address, self.policy, self.timeout)

    def connect(self, fingerprint: str | None = None) -> AttestedChannel:
        """Connect, if the policy accepts it, and it is the one of ``fingerprint`` or goes on for it.

        Raises:
            RollbackError: its membership is no continuation of the one that is known, see `known`.
            AttestationError: refused, or another enclave. Otherwise as `connect_attested`.
        """
        try:
            return self._connect(fingerprint)
        except RollbackError:  # or another thread kept a change that came after this connection was let in: look anew
            return self._connect(fingerprint)

    def _connect(self, fingerprint: str | None) -> AttestedChannel:
        channel = connect_attested(self.address, identity=self.identity, policy=self.policy, timeout=self.timeout)
        try:
            if fingerprint is not None:
                line_of(channel, fingerprint)
            if self.folder is not None:
                compare(channel, self.folder)
        except BaseException:
            channel.close()
            raise
        return channel

    def members(self) -> Members:
        """Return who may connect, with the signed changes by which it came to be, all checked."""
        with self.connect() as channel:
            return members_of(channel)

    def propose_change(self, act: Act, subject: Member | str) -> SignedChange:
        """Return a change of the membership of now, signed by this party: for the others to sign, or to hand in.

        Raises:
            ConsentError: it changes nothing, or the membership is still open.
        """
        now = self._membership()
        change = now.next(act, subject)
        now.applied(change)
        return SignedChange(change).sign(self.identity)

    def agree(self, signed: SignedChange) -> SignedChange:
        """Return a change with this party's signature, if it is the next one of the membership of now.

        Raises:
            ConsentError: it is of another enclave, or not the next change any more; perhaps it is in force already.
        """
        known = self._members()
        try:
            known.membership.applied(signed.change)
        except ConsentError as error:
            if signed.change not in [each.change for each in known.chain]:
                raise
            hint = "it is in force already, and nothing is left to sign: obfuscatune party members"
            raise ConsentError(error.what, got=error.got, expected=error.expected, hint=hint) from None
        return signed.sign(self.identity)

    def lacking(self, signed: SignedChange) -> str:
        """Return what lacks of a change's signatures, in words; empty where it can be handed in."""
        return self._membership().lacking(signed)

    def change(self, signed: SignedChange) -> None:
        """Hand in a change, which takes effect at once; raises ConsentError where the enclave refuses it."""
        with self.connect() as channel:
            channel.request({"op": "change_members"}, signed.to_bytes())

    def succeed(self, statement: bytes) -> None:
        """Hand in a statement by which an identity ends, as `party rotate` makes it; raises as the enclave refuses."""
        with self.connect() as channel:
            channel.request({"op": "succeed"}, statement)

    def hand_over(self, upgrade: Upgrade, address: str) -> bool:
        """Have the enclave hand its state over to the one at an address, which waits for it, and bring it there.

        To be asked again until it is done: nothing is lost in between, and the state goes to no third one.

        Returns:
            Whether it is done; False where it was done before.

        Raises:
            AttestationError: one of the two is refused; the new one is judged by the policy of ``upgrade``.
            UsageError: the address is the old one's. ConsentError: the old one refuses.
            NotTakenError: the new one lacks something, as it says.
        """
        new = replace(self, address=address, policy=upgrade.load_policy(), folder=None)
        with new.connect() as channel:
            if channel.enclave.fingerprint == upgrade.enclave:
                hint = "--to is the address of the new enclave, which was started with --take_over"
                raise UsageError("this is the old enclave's address", where=address, hint=hint)
            if goes_on(_certificates(channel), upgrade.enclave, channel.enclave.fingerprint):
                return False
            waiting = channel.enclave
        evidence, nonce = fetch_evidence(address, timeout=self.timeout)
        if judge(evidence, new.policy, nonce=nonce).require().identity != waiting:
            raise AttestationError("two enclaves at one address", where=address)
        statement, bundle = upgrade.to_bytes(), io.BytesIO()
        with self.connect(upgrade.enclave) as channel:
            fields = {"op": "hand_over", "statement": len(statement)}
            channel.request(fields, statement + evidence.to_bytes())
            download(channel, {"op": "bundle"}, bundle, max_bytes=MAX_BUNDLE_BYTES)
        size = bundle.tell()
        with new.connect(waiting.fingerprint) as channel:
            try:
                upload(channel, {"op": "take_over"}, bundle, size)
            except (UsageError, StorageError) as error:
                raise NotTakenError(error.what, hint=error.hint) from None
        return True

    def share(self) -> tuple[str, bytes]:
        """Return whose state (fingerprint) waits at this enclave to be released, and this party's share of its key.

        Raises:
            ConsentError: no share is this party's. UsageError: there is none. SealError: it does not open.
        """
        with self.connect() as channel:
            reply, wrapped = channel.request({"op": "share"})
        enclave, me = reply.get("enclave"), self.identity.public.fingerprint
        if not is_digest(enclave):
            raise ProtocolError("enclave tells no state to be released")
        return str(enclave), self.identity.unwrap(wrapped, share_info(str(enclave), me))

    def release(self, share: bytes) -> int:
        """Give this party's share of a state to this enclave; return how many parties' shares lack."""
        with self.connect() as channel:
            reply, _ = channel.request({"op": "release"}, share)
        lacking = reply.get("lacking")
        if not isinstance(lacking, list):
            raise ProtocolError("enclave's reply is not one to a share")
        return len(lacking)

    def _membership(self) -> Membership:
        return self._members().membership

    def _members(self) -> Members:
        members = self.members()
        if members.is_open:
            hint = "until the first job the operator's directory says who is in: give him the NAME.pub"
            raise ConsentError("the membership is not closed yet", hint=hint)
        return members


def verify_at(address: str, policy: Policy, timeout: float = 60.0) -> Verdict:
    """Judge fresh evidence of the enclave at an address; needs no identity. Raises as `fetch_evidence`."""
    evidence, nonce = fetch_evidence(address, timeout=timeout)
    return judge(evidence, policy, nonce=nonce)


def _certificates(channel: AttestedChannel) -> list[bytes]:
    """Return by which certificates an enclave goes on for others, none of them checked."""
    _, payload = channel.request({"op": "former"})
    return payload.splitlines()


def line_of(channel: AttestedChannel, fingerprint: str) -> frozenset[str]:
    """Return the fingerprints from one enclave to that of a channel, each of which has handed over to the next.

    Raises:
        AttestationError: it is another, and does not go on for it.
    """
    here = channel.enclave.fingerprint
    if here == fingerprint:
        return frozenset({here})
    try:
        certificates = _certificates(channel)
        if goes_on(certificates, fingerprint, here):
            return frozenset({here, *(old.fingerprint for old, _ in map(read_certificate, certificates))})
    except (BusyError, ConnectionClosedError):
        raise
    except ObfuscatuneError:  # whatever it says or shows: no error of another enclave's may keep a session with it
        pass
    what, where = "another enclave than the one asked for", channel.enclave.name
    raise AttestationError(what, got=here, expected=fingerprint, where=where)
