"""The enclave's process: opens its state, serves parties from threads, and runs jobs in the main thread.

directory/state.sealed    identity, book of jobs, head of the log      sealed to this code on this platform
directory/log.jsonl       the audit log                                no content
directory/store/          inputs, checkpoints, results                 sealed to their recipients
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from obfuscatune.durable import write_new
from obfuscatune.errors import ConsentError, StorageError, UsageError
from obfuscatune.parties.attestation.platform import Platform
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.channel.address import TlsAddress
from obfuscatune.parties.channel.server import AttestedServer
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.service.answering import STOPS, Answering
from obfuscatune.service.answers import Answers
from obfuscatune.service.book import Book
from obfuscatune.service.escrow import FILE as ESCROW_FILE
from obfuscatune.service.escrow import Escrow
from obfuscatune.service.fine_tuning import Hooks
from obfuscatune.service.log import AuditLog
from obfuscatune.service.members import Members
from obfuscatune.service.membership import MemberRequests
from obfuscatune.service.patience import Patience, Stopped
from obfuscatune.service.placement import Workers
from obfuscatune.service.requests import Requests
from obfuscatune.service.runner import RAM_PREFIX, Runner
from obfuscatune.service.scratch import ram_directory
from obfuscatune.service.state import State
from obfuscatune.service.store import Store
from obfuscatune.service.takeover import wait_for_hand_over
from obfuscatune.service.turns import Turns

logger = logging.getLogger(__name__)
QUERY_SECONDS = 600.0
LEAVING_SECONDS = 20.0  # for queries that are being answered when the operator stops the enclave
_DRAINING_SECONDS = 2.0  # for replies to get to their parties


class Service:
    """An enclave that serves: :meth:`work` in the main thread, until :meth:`stop` in another.

    Attributes:
        address: where it listens. identity: the enclave's, public.
    """

    def __init__(
        self, book: Book, runner: Runner, server_of: Callable[[Requests], AttestedServer], *, max_file_bytes: int
    ) -> None:
        self._book, self._runner = book, runner
        self._stopped = False
        self._patiently = Patience(book, lambda: self._stopped)
        answers = Answers()
        self._answering = Answering(book, runner, answers, lambda: self._stopped)
        requests = Requests(book, self._answering.add, answers, wait=QUERY_SECONDS, max_file_bytes=max_file_bytes)
        self._server = server_of(requests)
        self.address, self.identity = self._server.address, book.state.identity.public
        self._thread = threading.Thread(target=self._server.serve_forever, name="channel", daemon=True)

    def work(self) -> None:
        """Serve, and run what is queued, one after the other; queries have turns within jobs too."""
        self._thread.start()
        try:
            while True:
                with self._book.changed:
                    while not (
                        self._stopped or self._answering.wanted or self._book.has_queued() or self._holds_deleted()
                    ):
                        self._book.changed.wait()
                    if self._stopped:
                        return
                self._forget_deleted()
                self._answering.turn()
                if not self._stopped:
                    self._run_next()
        except Stopped:
            return

    def _run_next(self) -> None:
        """Run the next job, if there is one, unless the enclave is handed over meanwhile."""
        try:
            if (digest := self._patiently(self._book.next)) is not None:
                self._run(digest)
        except ConsentError:
            if not self._book.state.handed:
                raise
            self._runner.close()

    def stop(self) -> None:
        """Let :meth:`work` return when what it does is done."""
        with self._book.changed:
            self._stopped = True
            self._book.changed.notify_all()

    def leave(self) -> None:
        """End the process, once the queries that are being computed are answered; a job goes on at the next start.

        For a handler of signals, in the main thread. Raises SystemExit, here or where it may; a second time at once.
        A job's step is ended first, however long it takes: `LEAVING_SECONDS` bound the queries alone.
        """
        self._stopped = True
        if not self._answering.hurry(LEAVING_SECONDS):
            raise SystemExit(0)

    def close(self) -> None:
        """Stop listening and forget the model. What was committed is on the disk."""
        self._answering.close()
        self._server.drain(_DRAINING_SECONDS)
        self._server.close()
        self._runner.close()

    def expel(self, parties: frozenset[str]) -> None:
        """End the connections, queries and jobs of identities that are members no more."""
        for party in parties:
            self._server.expel(party)
        self._answering.expel(parties)
        try:
            self._book.end_jobs_of_who_left()
        except StorageError as error:  # none of them starts meanwhile, and the next start ends them
            logger.warning("%s", error)

    def _holds_deleted(self) -> bool:
        """Whether the model that is kept for queries is of a job that a party has deleted, or that has made room."""
        return self._runner.kept is not None and self._book.is_gone(self._runner.kept)

    def _forget_deleted(self) -> None:
        if self._holds_deleted():
            self._runner.close()

    def _run(self, digest: str) -> None:
        book, patiently = self._book, self._patiently

        def turn(seconds: float) -> None:
            self._forget_deleted()
            self._answering.turn(seconds)

        turns = Turns(turn, lambda: self._answering.wanted, lambda: self._answering.hurried)

        def progress(step: int, steps: int) -> None:
            book.progress(digest, step, steps, turns.seconds)
            if book.is_cancelled(digest):
                raise ConsentError("a party has cancelled the job")
            if book.state.handed:
                raise ConsentError("the enclave was handed over")

        hooks = Hooks(
            progress=progress,
            checkpoint=lambda step, file: patiently(lambda: book.checkpointed(digest, step, file), digest),
            placed=lambda parts: patiently(lambda: book.placed(digest, [part.to_dict() for part in parts]), digest),
            store=lambda act: patiently(act, digest),
            between=turns,
        )
        logger.info("job %s starts", digest[:16])
        try:
            results = self._runner.run(book.signed(digest), book.record(digest).checkpoint, hooks)
        except STOPS:
            raise
        except BaseException as error:  # the job has failed, not the service
            logger.warning("job %s failed: %s", digest[:16], type(error).__name__)
            failure = error
            if not book.state.handed:  # else it goes on elsewhere, from its last checkpoint
                patiently(lambda: book.failed(digest, failure))
        else:
            patiently(lambda: book.finished(digest, results), digest)
            if book.is_cancelled(digest) and self._runner.kept == digest:
                self._runner.close()
            logger.info("job %s is %s", digest[:16], book.record(digest).status)


@contextmanager
def open_service(
    directory: Path,
    platform: Platform,
    *,
    listen: str,
    parties: Path,
    operator: PublicIdentity | None = None,
    worker: str | Sequence[str],
    timeout: float = 600.0,
    worker_identity: Identity | None = None,
    insecure: bool = False,
    max_connections: int = 512,
    max_store_bytes: int = 1 << 40,
    take_over: PublicIdentity | None = None,
    new: bool = False,
    waiting: Callable[[str], None] = print,
    escrow: bool = False,
) -> Iterator[Service]:
    """Yield a service on the state of ``directory``, not working yet.

    Args:
        directory: of state, log and store; on any disk. platform: the TEE. listen: ``tls://HOST:PORT``.
        parties: directory of the ``.pub`` files of who may connect at first, see `members`. operator: who runs it,
            without whose signature nobody is admitted later.
        worker: one or several, as of `protect`; those at ``tls://`` are known by their identities, which jobs can name.
        timeout, insecure: as of `protect`. worker_identity: what the worker knows the enclave by; default: the
            enclave's own, whose public half is written to ``directory/enclave.pub`` for it.
        max_connections: as of `AttestedServer`. max_store_bytes: that uploads may take.
        escrow: keep the state of a platform without a sealing key on the disk, under a key of all parties.
        take_over: whose state it takes over first. waiting: called with where it waits for that.
        new: as of `State.open`; also where an earlier enclave's state is in escrow, which is removed.

    Raises:
        RollbackError, SealError: a state that is not the last one, or not of this code on this platform.
        AttestationError: the platform gives no evidence. UsageError: an address or directory that cannot be used; or
            a state in escrow is here, and neither ``take_over`` nor ``new`` says what becomes of it.
    """
    # What the operator may have mistyped comes first: a refusal makes nothing, and moves no counter.
    workers = Workers.parse([worker] if isinstance(worker, str) else worker, insecure=insecure)
    TlsAddress.parse(listen).require_free()
    if not 0 < timeout < math.inf:
        raise UsageError("timeout", got=timeout, expected="seconds, above 0")
    try:
        parties.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("cannot make the directory of parties", got=error.strerror, where=str(parties)) from None
    with ram_directory(RAM_PREFIX):
        pass  # removes what an enclave that was killed has left in memory
    with State.open(directory, platform, new=new) as state:
        if take_over is None:
            _keep_escrow(state, directory, new)
        if take_over is not None:
            wait_for_hand_over(
                state,
                directory,
                platform,
                listen=listen,
                parties=parties,
                operator=operator,
                old=take_over,
                waiting=waiting,
            )
        log = AuditLog.open(directory / "log.jsonl", state.log_head, state.log_length)
        members = Members(state, parties, operator)
        store = Store(directory / "store", max_store_bytes, members.parties)
        book = Book(state, log, store, members.parties, ended=members.strangers, left=members.left, names=members.names)
        members.note = book.note
        if escrow and state.in_memory:
            book.committed = Escrow(state, directory).write
        runner = Runner(
            state.identity,
            book.store,
            workers=workers,
            timeout=timeout,
            insecure=insecure,
            worker_identity=worker_identity,
            former=state.former_identities,
        )
        _publish(state.identity.public, directory / "enclave.pub")

        def server_of(requests: Requests) -> AttestedServer:
            return AttestedServer(
                listen,
                identity=state.identity,
                attester=platform.attester,
                allow=members.allows,
                handle=MemberRequests(members, book, requests.handle, simulated=platform.simulated).handle,
                idle_timeout=QUERY_SECONDS,
                max_connections=max_connections,
                members=members.told,
            )

        service = Service(book, runner, server_of, max_file_bytes=max_store_bytes)
        members.removed = service.expel
        try:
            if not members.current:
                logger.warning("nobody may connect yet: put the parties' NAME.pub files into %s", parties)
            if state.handed:
                logger.warning("the state was handed over to %s: nothing is done here any more", state.handed["to"])
            else:
                book.note(
                    "enclave-started",
                    simulated=int(platform.simulated),
                    dropped=log.dropped_bytes,
                    enclave=state.identity.public.fingerprint,
                    former=len(state.former),
                    **({} if members.founded is None else {"members": members.founded.digest}),
                )
            yield service
        finally:
            service.close()
            log.close()


def _keep_escrow(state: State, directory: Path, new: bool) -> None:
    """Refuse to begin an enclave where an earlier one has left its state in escrow: it would take its log and store.

    So no service manager that starts the enclave again destroys what the parties can still release.
    """
    path = directory / ESCROW_FILE
    if state.log_length or not path.exists():
        return
    if not new:
        hint = (
            "`--take_over` with the earlier one's enclave.pub waits until all parties have released it (obfuscatune "
            "party release); `--new` begins a new enclave, and all that the earlier one had is lost"
        )
        what, got = "an earlier enclave's state is here in escrow", "neither --take_over nor --new"
        raise UsageError(what, got=got, where=str(path), hint=hint)
    try:
        path.unlink()
    except OSError as error:
        raise UsageError("cannot remove the earlier state", got=error.strerror, where=str(path)) from None


def _publish(identity: PublicIdentity, path: Path) -> None:
    """Write the enclave's public identity, which the operator gives to a worker; replaces that of an earlier state."""
    try:
        path.unlink(missing_ok=True)
        write_new(path, encode(identity.to_dict()) + b"\n", mode=0o644)
    except OSError as error:
        raise UsageError("cannot write the enclave's identity", got=error.strerror, where=str(path)) from None
