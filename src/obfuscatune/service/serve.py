"""The enclave's process: opens its state, serves parties from threads, and runs jobs in the main thread.

directory/state.sealed    identity, book of jobs, head of the log      sealed to this code on this platform
directory/log.jsonl       the audit log                                no content
directory/store/          inputs, checkpoints, results                 sealed to their recipients
"""

import collections
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from obfuscatune.durable import write_new
from obfuscatune.errors import UsageError
from obfuscatune.parties.attestation.platform import Platform
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.channel.server import AttestedServer
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.service.answers import Answers
from obfuscatune.service.book import Book
from obfuscatune.service.log import AuditLog
from obfuscatune.service.requests import Query, Requests
from obfuscatune.service.runner import RAM_PREFIX, Hooks, Runner
from obfuscatune.service.scratch import ram_directory
from obfuscatune.service.state import State
from obfuscatune.service.store import Store
from obfuscatune.training.completion import Completion

logger = logging.getLogger(__name__)
QUERY_SECONDS = 600.0
# What ends the service. A panic in a tokenizer's Rust is no Exception, and a party's file can make one.
_STOPS = (SystemExit, KeyboardInterrupt)


class Service:
    """An enclave that serves: :meth:`work` in the main thread, until :meth:`stop` in another.

    Attributes:
        address: where it listens. identity: the enclave's, public.
    """

    def __init__(
        self, book: Book, runner: Runner, server_of: Callable[[Requests], AttestedServer], *, max_file_bytes: int
    ) -> None:
        self._book, self._runner = book, runner
        self._queries: collections.deque[Query] = collections.deque()
        self._stopped = False
        self._answers = Answers()
        requests = Requests(book, self._ask, self._answers, wait=QUERY_SECONDS, max_file_bytes=max_file_bytes)
        self._server = server_of(requests)
        self.address, self.identity = self._server.address, book.state.identity.public
        self._thread = threading.Thread(target=self._server.serve_forever, name="channel", daemon=True)

    def work(self) -> None:
        """Serve, and run what is queued, one after the other; queries go before jobs."""
        self._thread.start()
        while True:
            with self._book.changed:
                while not (self._stopped or self._queries or self._book.has_queued()):
                    self._book.changed.wait()
                if self._stopped:
                    return
                query = self._queries.popleft() if self._queries else None
                digest = self._book.next() if query is None else None
            if query is not None:
                self._answer(query)
            elif digest is not None:
                self._run(digest)

    def stop(self) -> None:
        """Let :meth:`work` return when what it does is done."""
        with self._book.changed:
            self._stopped = True
            self._book.changed.notify_all()

    def close(self) -> None:
        """Stop listening and forget the model. What was committed is on the disk."""
        self._server.close()
        self._runner.close()

    def _ask(self, query: Query) -> None:
        with self._book.changed:
            self._queries.append(query)
            self._book.changed.notify_all()

    def _answer(self, query: Query) -> None:
        question = (query.job, query.party, query.prompts, query.max_new_tokens)
        try:
            if not query.take():
                return
            known = self._answers.get(*question)  # asked twice at once, or answered while whoever asked was away
            query.completions = self._complete(query) if known is None else known
            self._answers.put(*question, query.completions)
        except _STOPS:
            raise
        except BaseException as error:  # goes to the party that asked; the service goes on, and with it the model
            query.error = error
        finally:
            query.done.set()

    def _complete(self, query: Query) -> list[Completion]:
        """Check, count, compute, in this order: a prompt that is refused costs nothing, and no crash gives any away."""
        asked = (query.job, query.party, len(query.prompts), query.max_new_tokens)
        self._book.check_query(*asked)
        adapter = self._book.record(query.job).results["adapter"]
        self._runner.check(self._book.signed(query.job), adapter, query.prompts, query.max_new_tokens)
        self._book.count_query(*asked)
        try:
            return self._runner.answer(query.job, query.prompts, query.max_new_tokens)
        except _STOPS:
            raise
        except BaseException:
            self._book.uncount_query(query.job, query.party, len(query.prompts))
            raise

    def _run(self, digest: str) -> None:
        book = self._book
        hooks = Hooks(
            progress=lambda step, steps: book.progress(digest, step, steps),
            checkpoint=lambda step, checkpoint: book.checkpointed(digest, step, checkpoint),
        )
        logger.info("job %s starts", digest[:16])
        try:
            results = self._runner.run(book.signed(digest), book.record(digest).checkpoint, hooks)
        except _STOPS:
            raise
        except BaseException as error:  # the job has failed, not the service
            logger.warning("job %s failed: %s", digest[:16], type(error).__name__)
            book.failed(digest, error)
            self._runner.close()
        else:
            book.finished(digest, results)
            logger.info("job %s is done", digest[:16])


@contextmanager
def open_service(
    directory: Path,
    platform: Platform,
    *,
    listen: str,
    parties: Path,
    worker: str,
    timeout: float = 600.0,
    worker_identity: Identity | None = None,
    insecure: bool = False,
    max_store_bytes: int = 1 << 40,
) -> Iterator[Service]:
    """Yield a service on the state of ``directory``, not working yet.

    Args:
        directory: of state, log and store; on any disk. platform: the TEE. listen: ``tls://HOST:PORT``.
        parties: directory of the ``.pub`` files of who may connect; read anew for each connection.
        worker, timeout, insecure: as of `protect`. worker_identity: what the worker knows the enclave by; default: the
            enclave's own, whose public half is written to ``directory/enclave.pub`` for it.
        max_store_bytes: that uploads may take.

    Raises:
        RollbackError, SealError: a state that is not the last one, or not of this code on this platform.
        AttestationError: the platform gives no evidence. UsageError: an address or directory that cannot be used.
    """
    load_parties(parties)
    with ram_directory(RAM_PREFIX):
        pass  # removes what an enclave that was killed has left in memory
    with State.open(directory, platform) as state:
        log = AuditLog.open(directory / "log.jsonl", state.log_head, state.log_length)
        book = Book(state, log, Store(directory / "store", max_store_bytes))
        runner = Runner(
            state.identity,
            book.store,
            worker=worker,
            timeout=timeout,
            insecure=insecure,
            worker_identity=worker_identity,
        )
        _publish(state.identity.public, directory / "enclave.pub")

        def server_of(requests: Requests) -> AttestedServer:
            return AttestedServer(
                listen,
                identity=state.identity,
                attester=platform.attester,
                allow=lambda client: client in load_parties(parties),
                handle=requests.handle,
                idle_timeout=QUERY_SECONDS,
            )

        service = Service(book, runner, server_of, max_file_bytes=max_store_bytes)
        try:
            book.note("enclave-started", simulated=int(platform.simulated), dropped=log.dropped_bytes)
            yield service
        finally:
            service.close()
            log.close()


def _publish(identity: PublicIdentity, path: Path) -> None:
    """Write the enclave's public identity, which the operator gives to a worker; replaces that of an earlier state."""
    try:
        path.unlink(missing_ok=True)
        write_new(path, encode(identity.to_dict()) + b"\n", mode=0o644)
    except OSError as error:
        raise UsageError("cannot write the enclave's identity", got=error.strerror, where=str(path)) from None


def load_parties(directory: Path) -> list[PublicIdentity]:
    """Return the identities of a directory's ``.pub`` files.

    Raises:
        UsageError: it cannot be read. FormatError: a file in it that is no identity.
    """
    if not directory.is_dir():
        raise UsageError("no such directory of parties", where=str(directory), hint="put their NAME.pub files there")
    return [PublicIdentity.load(path) for path in sorted(directory.glob("*.pub"))]
