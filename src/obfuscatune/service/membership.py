"""The requests of members about the membership and the hand-over; all others go on to `requests`."""

import io
import logging
from collections.abc import Callable
from typing import Any

from obfuscatune.errors import ConsentError, ObfuscatuneError, ProtocolError, UsageError
from obfuscatune.parties.change import MAX_CHANGE_BYTES
from obfuscatune.parties.channel.server import Parts, Reply
from obfuscatune.parties.channel.transfer import serve_piece
from obfuscatune.parties.identity import PublicIdentity
from obfuscatune.parties.job import SignedJob
from obfuscatune.service.book import Book
from obfuscatune.service.handover import give
from obfuscatune.service.members import Members
from obfuscatune.service.takeover import certificates

logger = logging.getLogger(__name__)
_AFTERWARDS = ("members", "former", "hand_over", "bundle", "log", "status", "list")  # once it was handed over
Handler = Callable[[PublicIdentity, dict[str, Any], bytes], Reply | Parts]


class MemberRequests:
    """Answers what is asked of the membership; called from the threads of the channel.

    Args:
        members: the membership. book: of the jobs. others: answers every other request. simulated: whether the enclave
            runs in a simulator.
    """

    def __init__(self, members: Members, book: Book, others: Handler, *, simulated: bool = False) -> None:
        self._members, self._book, self._others, self._simulated = members, book, others, simulated
        self._bundle = b""
        self._operations: dict[str, Handler] = {
            "members": self._lines,
            "change_members": self._change,
            "succeed": self._succeed,
            "former": lambda party, fields, payload: certificates(book.state),
            "hand_over": self._hand_over,
            "bundle": self._piece,
            "share": self._nothing_waits,
            "release": self._nothing_waits,
        }

    def handle(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply | Parts:
        """Answer one request. Raises ObfuscatuneError: what the party is told."""
        operation, handed = fields.get("op"), self._book.state.handed
        if handed and operation not in _AFTERWARDS:
            hint = "connect to the enclave that goes on; your policy must accept its code"
            raise ConsentError("the enclave was handed over", got=f"to {handed['to'][:16]}", hint=hint)
        if isinstance(operation, str) and operation in self._operations:
            return self._operations[operation](party, fields, payload)
        if operation == "submit" and self._is_first(payload, party):
            self._members.found()  # from now on who is in needs signatures
        return self._others(party, fields, payload)

    def _is_first(self, payload: bytes, party: PublicIdentity) -> bool:
        """Return whether a job closes the membership: one of two members, from one of them, that is taken in now."""
        if self._members.founded is not None:
            return False
        try:
            signed = SignedJob.from_bytes(payload)
            self._book.check(signed)
        except ObfuscatuneError:  # the refusal is made, and noted, where all are
            return False
        both = {signed.job.provider, signed.job.owner}
        return party.fingerprint in both and both <= set(self._members.parties())

    def _lines(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        start = fields.get("start")
        if type(start) is not int:
            raise ProtocolError("members without a start")
        return self._members.lines(start)

    def _change(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        return self._members.change(_short(payload), party), b""

    def _succeed(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        return self._members.succeed(_short(payload), party), b""

    def _hand_over(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        size = fields.get("statement")
        if type(size) is not int or not 0 < size < len(payload):
            raise ProtocolError("not a hand-over", expected="a statement and evidence")
        bundle = give(self._book, payload[:size], payload[size:], simulated=self._simulated)
        with self._book.state.lock:  # the first one stays: else who asks again spoils what another is fetching
            self._bundle = self._bundle or bundle
        logger.info("handed over to %s", self._book.state.handed["to"])
        return {"size": len(self._bundle)}, b""

    def _piece(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        bundle = self._bundle
        if not bundle:
            raise UsageError("nothing was handed over", hint="obfuscatune party hand-over")
        return serve_piece(fields, io.BytesIO(bundle), len(bundle))

    def _nothing_waits(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        """Refuse what is for an enclave that waits: a party may ask again whose last reply was lost."""
        goes_on = bool(self._book.state.former)
        got = "it goes on for an earlier one already" if goes_on else "it began without an earlier one's state"
        hint = "nothing is left to release" if goes_on else "is this the address of the enclave with --take_over"
        raise UsageError("no state waits to be released at this enclave", got=got, hint=hint)


def _short(payload: bytes) -> bytes:
    if len(payload) > MAX_CHANGE_BYTES:
        raise ProtocolError("payload too long", got=f"{len(payload)} bytes", expected=f"at most {MAX_CHANGE_BYTES}")
    return payload
