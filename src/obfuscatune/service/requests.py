"""The requests of parties: each names an operation, and sees only jobs in which the party has a role."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from obfuscatune.errors import (
    BusyError,
    ConsentError,
    FormatError,
    ObfuscatuneError,
    ProtocolError,
    StorageError,
    UsageError,
)
from obfuscatune.parties.channel.server import Parts, Reply
from obfuscatune.parties.channel.transfer import Piece, serve_piece
from obfuscatune.parties.identity import PublicIdentity
from obfuscatune.parties.job import SignedJob
from obfuscatune.parties.sealed.header import open_file
from obfuscatune.parties.vocabulary import TOO_MANY
from obfuscatune.service.answers import Answers
from obfuscatune.service.book import Book
from obfuscatune.service.consent import OWNERS
from obfuscatune.service.queries import Query, read_prompts, read_settings
from obfuscatune.service.records import Record
from obfuscatune.service.upload import Upload
from obfuscatune.training.completion import Completion

MAX_WAITING = 4  # queries of one party at a time: each holds a connection and its prompts
LOOK_SECONDS = 0.5  # in which a client that has left is noticed, where there is nothing to send


class Requests:
    """Answers requests; called from the threads of the channel.

    Args:
        book: of the jobs. ask: hands a query to the thread that has the model. answers: that it remembers.
        wait: seconds that a query may take.
        max_file_bytes: of an upload.
    """

    def __init__(
        self, book: Book, ask: Callable[[Query], None], answers: Answers, *, wait: float, max_file_bytes: int
    ) -> None:
        self._answers = answers
        self._book, self._ask, self._wait, self._max_file_bytes = book, ask, wait, max_file_bytes
        self._lock = threading.Lock()  # of the two below
        self._under_way: dict[str, list[Query]] = {}
        self._fetched: set[tuple[str, str, str]] = set()
        self._operations: dict[str, Callable[[PublicIdentity, dict[str, Any], bytes], Reply | Parts]] = {
            "submit": self._submit,
            "resume_upload": self._resume_upload,
            "upload": self._upload,
            "status": self._status,
            "download": self._download,
            "log": self._log,
            "generate": self._generate,
            "list": self._list,
            "cancel": self._cancel,
            "delete": self._delete,
        }

    def handle(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply | Parts:
        """Answer one request; a query in parts, of which all but the last are there only where it wants a stream.

        Raises:
            ObfuscatuneError: what the party is told: no content, and nothing of jobs that are not its own.
        """
        operation = fields.get("op")
        if not isinstance(operation, str) or operation not in self._operations:
            raise ProtocolError("unknown operation", expected=", ".join(self._operations))
        return self._operations[operation](party, fields, payload)

    def _submit(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        signed = SignedJob.from_bytes(payload, "submitted job")
        if signed.job.role_of(party.fingerprint) is None:
            raise ConsentError("job of other parties", hint="only its provider and its owner submit it")
        digest = self._book.submit(signed, party.fingerprint)
        return self._tell(digest, party), b""

    def _resume_upload(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        job, digest, size = self._input(party, fields)
        store = self._book.store
        if store.has(digest):
            return {"offset": size}, b""
        self._make_room(party, size)
        upload = store.begin(digest, size, party.fingerprint)
        if upload.offset == size:  # all is here, but a crash or a full disk kept the file from being accepted
            try:
                upload.finish()
            except FormatError:  # the crash has torn it, and nothing of it was kept
                upload = store.begin(digest, size, party.fingerprint)
            except (ProtocolError, UsageError):
                if not store.has(digest):
                    raise
                # another connection of the party has resumed it, too
            else:
                self._came(job, upload, party)
        return {"offset": upload.offset}, b""

    def _upload(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        job, digest, size = self._input(party, fields)
        piece = Piece.of(fields, payload, max_bytes=self._max_file_bytes)
        self._make_room(party, len(piece.data))
        upload = self._book.store.begin(digest, size, party.fingerprint)
        upload.write(piece.offset, piece.data)
        if piece.is_last:
            upload.finish()
            self._came(job, upload, party)
        return {}, b""

    def _came(self, job: str, upload: Upload, party: PublicIdentity) -> None:
        """Enter an input that is in the store now, and go on with the jobs that have waited for it."""
        self._book.note("input", job, party.fingerprint, file=upload.digest, bytes=upload.size)
        self._book.review()

    def _make_room(self, party: PublicIdentity, size: int) -> None:
        """Let jobs of the party that are over make room, if an upload needs it."""

        def enough() -> bool:
            return self._book.store.room(party.fingerprint) >= size

        if not enough() and size <= self._book.store.max_bytes:
            self._book.room.make(party.fingerprint, enough)

    def _input(self, party: PublicIdentity, fields: dict[str, Any]) -> tuple[str, str, int]:
        """Return job, digest and size of an input that this party owes to a waiting job: nothing else is stored."""
        name, record = self._own(party, fields)
        digest, size, waits = fields.get("file"), fields.get("size"), record.status == "waiting"
        job = self._book.signed(name).job
        role = job.role_of(party.fingerprint)
        mine = [file for kind, file in job.inputs.items() if OWNERS[kind] == role and waits]
        if not isinstance(digest, str) or digest not in mine:
            raise ConsentError("not an input that this party owes to the job", expected=f"one of {len(mine)} digests")
        if type(size) is not int or not 0 < size <= self._max_file_bytes:
            raise UsageError("size of an upload", got=size, expected=f"1 to {self._max_file_bytes} bytes")
        return name, digest, size

    def _status(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        return self._tell(self._own(party, fields)[0], party), b""

    def _tell(self, digest: str, party: PublicIdentity) -> dict[str, Any]:
        """Return what a party may know of a job: progress, no content."""
        record = self._book.record(digest)
        operators = self._book.operators_of(digest)
        return {
            "job": digest,
            "status": record.status,
            "reason": record.reason,
            "step": record.step,
            "steps": record.steps,
            "resumes_from": record.checkpoint_step if record.status in ("failed", "waiting", "queued") else 0,
            "missing": self._book.missing(digest) if record.status == "waiting" else {},
            "results": self._book.results_for(digest, party.fingerprint),
            "queries": record.queries,
            "answering": record.answering,
            "workers": [{**part, "operator": operators.get(part["worker"], "")} for part in record.workers],
        }

    def _list(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        found = [self._tell(digest, party) for digest in self._book.jobs_of(party.fingerprint)]
        return {}, json.dumps(found).encode()

    def _cancel(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        digest, _ = self._own(party, fields)
        self._book.cancel(digest, party.fingerprint)
        return self._tell(digest, party), b""

    def _delete(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        digest, _ = self._own(party, fields)
        self._book.delete(digest, party.fingerprint)
        return self._tell(digest, party), b""

    def _download(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        job, kind = self._own(party, fields)[0], fields.get("kind")
        results = self._book.results_for(job, party.fingerprint)
        if not isinstance(kind, str) or kind not in results:
            raise ConsentError("no such result for this party", got=f"{len(results)} results for it")
        with open_file(self._book.store.path(results[kind])) as file:
            size = os.fstat(file.fileno()).st_size
            reply, data = serve_piece(fields, file, size)
        fetched = (job, party.fingerprint, kind)
        with self._lock:
            first = fetched not in self._fetched
        if first:  # and not at every piece, or every time: a party must not be able to flood the log
            self._book.note("fetched", job, party.fingerprint, result=kind)
            with self._lock:
                self._fetched.add(fetched)
        if fields["offset"] + len(data) == size:
            self._book.fetched(job, party.fingerprint, kind)
        return reply, data

    def _log(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        start = fields.get("start")
        if type(start) is not int:
            raise ProtocolError("log without a start")
        head, lines = self._book.committed_log(start)
        return {"head": head}, lines

    def _generate(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply | Parts:
        digest, wait, streaming = self._own(party, fields)[0], fields.get("wait", self._wait), fields.get("stream", 0)
        chosen = read_settings(fields)
        if type(wait) not in (int, float) or not 0 < wait < float("inf"):
            raise UsageError("wait", expected="seconds for which the client stays")
        if type(streaming) is not int or streaming not in (0, 1):
            raise UsageError("stream", expected="0 or 1")
        query = Query(digest, party.fingerprint, read_prompts(payload), chosen, bool(streaming))
        if streaming and len(query.prompts) > 1:
            raise UsageError("a stream of several prompts", got=len(query.prompts), expected=1)
        known, asked = self._answers.get(query.question), (len(query.prompts), chosen.longest, query.question)
        self._book.questions.check(digest, party.fingerprint, *((0, chosen.longest) if known is not None else asked))
        return _reply(query, known) if known is not None else self._parts(query, min(wait, self._wait))

    def _parts(self, query: Query, wait: float) -> Parts:
        """Hand a query over, and yield what there is of its answer; one whose client leaves is given up."""
        until = time.monotonic() + wait
        with self._place(query):
            self._ask(query)
            try:
                while not query.done and (rest := until - time.monotonic()) > 0:
                    found = query.next(min(LOOK_SECONDS, rest))
                    if found is not None:
                        yield {"tokens": found[1]}, found[0].encode()
                    elif not query.done:
                        yield None
            except GeneratorExit:
                query.leave()
                raise
            query.drop()
        if not query.done:
            raise BusyError("the enclave is busy", hint="ask again when the running job is done")
        if query.error is not None:
            raise _told(query.error)
        return _reply(query, query.completions)

    @contextlib.contextmanager
    def _place(self, query: Query) -> Iterator[None]:
        """Hold one of a party's places until the query is done, though its party may have gone before."""
        with self._lock:
            held = [one for one in self._under_way.get(query.party, ()) if one.under_way]
            self._under_way[query.party] = held
            if len(held) >= MAX_WAITING:
                hint = "ask again when one of them is answered"
                raise BusyError(TOO_MANY, expected=f"at most {MAX_WAITING} of a party", hint=hint)
            held.append(query)
        try:
            yield
        finally:
            with self._lock:
                self._under_way[query.party] = [one for one in self._under_way[query.party] if one.under_way]

    def _own(self, party: PublicIdentity, fields: dict[str, Any]) -> tuple[str, Record]:
        """Return digest and record of the job that a request names, if the party has a role in it."""
        return self._book.job_of(fields.get("job"), party.fingerprint)


def _told(error: BaseException) -> ObfuscatuneError:
    """What a party hears of its query's failure: of the rest of the job's world, which may be the other's, the class.

    What is said of a prompt, by its number, and of consent is this party's own business.
    """
    if isinstance(error, BusyError):
        return error
    if isinstance(error, StorageError):
        return BusyError("the enclave's disk is full", hint="ask again when its operator has made room")
    of_prompt = isinstance(error, UsageError) and (error.where or "").startswith("prompt ")
    if isinstance(error, ObfuscatuneError) and (of_prompt or isinstance(error, ConsentError)):
        return error
    return ObfuscatuneError("the query failed in the enclave", got=type(error).__name__)


def _reply(query: Query, completions: list[Completion]) -> Reply:
    """Return the texts, and in the fields what is counted of each; of a stream the rest of its text."""
    fields = {
        "prompt_tokens": [completion.prompt_tokens for completion in completions],
        "completion_tokens": [completion.tokens for completion in completions],
        "ended": [int(completion.ended) for completion in completions],
    }
    texts = [completion.text for completion in completions]
    if query.streaming:
        return fields, "".join(texts)[query.sent :].encode()
    return fields, json.dumps(texts, ensure_ascii=False).encode()
