"""The requests of parties: each names an operation, and sees only jobs in which the party has a role."""

import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
from obfuscatune.parties.channel.transfer import Piece, serve_piece
from obfuscatune.parties.identity import PublicIdentity
from obfuscatune.parties.job import SignedJob
from obfuscatune.parties.sealed.header import open_file
from obfuscatune.service.answers import Answers
from obfuscatune.service.book import Book
from obfuscatune.service.consent import OWNERS
from obfuscatune.service.records import Record
from obfuscatune.training.completion import Completion
from obfuscatune.training.data import ROLES, Prompt

MAX_PROMPTS = 256
MAX_PROMPT_BYTES = 1 << 20
MAX_WAITING = 4  # queries of one party at a time: each holds a connection and its prompts
_MAX_TOKENS = 65_536

Reply = tuple[dict[str, Any], bytes]


@dataclass
class Query:
    """Prompts of a party on their way to the thread that has the model. Secret."""

    job: str
    party: str
    prompts: list[Prompt] = field(repr=False)
    max_new_tokens: int
    done: threading.Event = field(default_factory=threading.Event, repr=False)
    completions: list[Completion] = field(default_factory=list, repr=False)
    error: BaseException | None = field(default=None, repr=False)
    _taken: bool = field(default=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def take(self) -> bool:
        """Return whether it is to be answered, or else dropped: whoever asked waits no longer."""
        with self._lock:
            self._taken = True
            return bool(self.prompts)

    def drop(self) -> None:
        """Forget the prompts, unless they are being answered."""
        with self._lock:
            if not self._taken:
                self.prompts.clear()


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
        self._waiting: Counter[str] = Counter()
        self._fetched: set[tuple[str, str, str]] = set()
        self._operations: dict[str, Callable[[PublicIdentity, dict[str, Any], bytes], Reply]] = {
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

    def handle(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        """Answer one request.

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
        _, digest, size = self._input(party, fields)
        store = self._book.store
        if store.has(digest):
            return {"offset": size}, b""
        self._make_room(party, size)
        return {"offset": store.begin(digest, size, party.fingerprint).offset}, b""

    def _upload(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        job, digest, size = self._input(party, fields)
        piece = Piece.of(fields, payload, max_bytes=self._max_file_bytes)
        self._make_room(party, len(piece.data))
        upload = self._book.store.begin(digest, size, party.fingerprint)
        upload.write(piece.offset, piece.data)
        if piece.is_last:
            upload.finish()
            self._book.note("input", job, party.fingerprint, file=digest, bytes=size)
            self._book.review()
        return {}, b""

    def _make_room(self, party: PublicIdentity, size: int) -> None:
        """Let jobs of the party that are over make room, if an upload needs it."""

        def enough() -> bool:
            return self._book.store.room(party.fingerprint) >= size

        if not enough() and size <= self._book.store.max_bytes:
            self._book.make_room(party.fingerprint, enough)

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

    def _generate(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        digest, tokens, wait = self._own(party, fields)[0], fields.get("max_new_tokens"), fields.get("wait", self._wait)
        if type(tokens) is not int or not 1 <= tokens <= _MAX_TOKENS:
            raise UsageError("max_new_tokens", expected=f"1 to {_MAX_TOKENS}")
        if type(wait) not in (int, float) or not 0 < wait < float("inf"):
            raise UsageError("wait", expected="seconds for which the client stays")
        query = Query(digest, party.fingerprint, _prompts(payload), tokens)
        known = self._answers.get(digest, party.fingerprint, query.prompts, tokens)
        self._book.check_query(digest, party.fingerprint, 0 if known is not None else len(query.prompts), tokens)
        if known is not None:
            return _reply(known)
        with self._place(party.fingerprint):
            self._ask(query)
            answered = query.done.wait(min(wait, self._wait))
            query.drop()
        if not answered:
            raise BusyError("the enclave is busy", hint="ask again when the running job is done")
        if query.error is not None:
            raise _told(query.error)
        return _reply(query.completions)

    @contextlib.contextmanager
    def _place(self, party: str) -> Iterator[None]:
        """Hold one of a party's places among the waiting queries."""
        with self._lock:
            if self._waiting[party] >= MAX_WAITING:
                hint = "ask again when one of them is answered"
                raise BusyError("too many queries at a time", expected=f"at most {MAX_WAITING} of a party", hint=hint)
            self._waiting[party] += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting[party] -= 1

    def _own(self, party: PublicIdentity, fields: dict[str, Any]) -> tuple[str, Record]:
        """Return digest and record of the job that a request names, if the party has a role in it."""
        return self._book.job_of(fields.get("job"), party.fingerprint)


def _told(error: BaseException) -> ObfuscatuneError:
    """What a party hears of its query's failure: of the rest of the job's world, which may be the other's, the class.

    What is said of a prompt, by its number, and of consent is this party's own business.
    """
    if isinstance(error, StorageError):
        return BusyError("the enclave's disk is full", hint="ask again when its operator has made room")
    of_prompt = isinstance(error, UsageError) and (error.where or "").startswith("prompt ")
    if isinstance(error, ObfuscatuneError) and (of_prompt or isinstance(error, ConsentError)):
        return error
    return ObfuscatuneError("the query failed in the enclave", got=type(error).__name__)


def _reply(completions: list[Completion]) -> Reply:
    """Return the texts, and in the fields what is counted of each."""
    fields = {
        "prompt_tokens": [completion.prompt_tokens for completion in completions],
        "completion_tokens": [completion.tokens for completion in completions],
        "ended": [int(completion.ended) for completion in completions],
    }
    return fields, json.dumps([completion.text for completion in completions], ensure_ascii=False).encode()


def _prompts(payload: bytes) -> list[Prompt]:
    """Return the prompts of a query: a JSON list of texts, or of lists of messages with a role and a content."""
    problem: FormatError | None = None
    if len(payload) > MAX_PROMPT_BYTES:
        raise FormatError("prompts are too long", got=f"{len(payload)} bytes", expected=f"at most {MAX_PROMPT_BYTES}")
    prompts: Any = None
    try:
        prompts = json.loads(payload.decode("utf-8"))
    except (ValueError, RecursionError):
        problem = FormatError("prompts are not JSON")
    if problem is not None:  # outside the handler: the decoder's exception holds the text
        raise problem
    fits = isinstance(prompts, list) and 1 <= len(prompts) <= MAX_PROMPTS
    found = [_prompt(prompt) for prompt in prompts] if fits else []
    if not found or None in found:
        raise FormatError("not a list of prompts", expected=f"1 to {MAX_PROMPTS} texts, or lists of messages")
    return [prompt for prompt in found if prompt is not None]


def _prompt(value: Any) -> Prompt | None:
    if _is_text(value):
        return str(value)
    if not isinstance(value, list) or not value:
        return None
    turns = []
    for message in value:
        if not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] not in ROLES:
            return None
        if not _is_text(message["content"]):
            return None
        turns.append((message["role"], message["content"]))
    return tuple(turns)


def _is_text(value: Any) -> bool:
    """Whether it is a text with something in it, and no half of a surrogate pair, which no tokenizer takes."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= char <= "\udfff" for char in value)
