"""The requests of parties: each names an operation, and sees only jobs in which the party has a role."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from obfuscatune.channel.transfer import Piece, serve_piece
from obfuscatune.errors import ConsentError, FormatError, ObfuscatuneError, ProtocolError, UsageError
from obfuscatune.parties.identity import PublicIdentity
from obfuscatune.parties.job import SignedJob
from obfuscatune.service.book import Book
from obfuscatune.service.consent import OWNERS

MAX_PROMPTS = 256
MAX_PROMPT_BYTES = 1 << 20
_RESULT_ROLES = {"adapter": "adapter_to", "output": "generations_to"}

Reply = tuple[dict[str, Any], bytes]


@dataclass
class Query:
    """Prompts of a party on their way to the thread that has the model. Secret."""

    job: str
    prompts: list[str] = field(repr=False)
    max_new_tokens: int
    done: threading.Event = field(default_factory=threading.Event)
    completions: list[str] = field(default_factory=list, repr=False)
    error: BaseException | None = None


class Requests:
    """Answers requests; called from the threads of the channel.

    Args:
        book: of the jobs. ask: hands a query to the thread that has the model. wait: seconds that a query may take.
        max_file_bytes: of an upload.
    """

    def __init__(self, book: Book, ask: Callable[[Query], None], *, wait: float, max_file_bytes: int) -> None:
        self._book, self._ask, self._wait, self._max_file_bytes = book, ask, wait, max_file_bytes
        self._operations: dict[str, Callable[[PublicIdentity, dict[str, Any], bytes], Reply]] = {
            "submit": self._submit,
            "resume_upload": self._resume_upload,
            "upload": self._upload,
            "status": self._status,
            "download": self._download,
            "log": self._log,
            "generate": self._generate,
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
        digest, size = self._input(party, fields)
        return {"offset": size if self._book.store.has(digest) else self._book.store.begin(digest, size).offset}, b""

    def _upload(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        digest, size = self._input(party, fields)
        piece = Piece.of(fields, payload, max_bytes=self._max_file_bytes)
        upload = self._book.store.begin(digest, size)
        upload.write(piece.offset, piece.data)
        if piece.is_last:
            upload.finish()
            self._book.note("input", self._own(party, fields), party.fingerprint, file=digest, bytes=size)
            self._book.review()
        return {}, b""

    def _input(self, party: PublicIdentity, fields: dict[str, Any]) -> tuple[str, int]:
        """Return digest and size of an input that this party owes to one of its jobs: nothing else is stored."""
        job = self._book.signed(self._own(party, fields)).job
        digest, size = fields.get("file"), fields.get("size")
        role = job.role_of(party.fingerprint)
        mine = [file for kind, file in job.inputs.items() if OWNERS[kind] == role]
        if not isinstance(digest, str) or digest not in mine:
            raise ConsentError("not an input that this party owes to the job", expected=f"{len(mine)} of digests in it")
        if type(size) is not int or not 0 < size <= self._max_file_bytes:
            raise UsageError("size of an upload", got=size, expected=f"1 to {self._max_file_bytes} bytes")
        return digest, size

    def _status(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        if fields.get("job") is None:
            return {"jobs": [self._tell(digest, party) for digest in self._book.jobs_of(party.fingerprint)]}, b""
        return self._tell(self._own(party, fields), party), b""

    def _tell(self, digest: str, party: PublicIdentity) -> dict[str, Any]:
        """Return what a party may know of a job: progress, no content."""
        record, job = self._book.record(digest), self._book.signed(digest).job
        role = job.role_of(party.fingerprint)
        return {
            "job": digest,
            "status": record.status,
            "reason": record.reason,
            "step": record.step,
            "steps": record.steps,
            "missing": self._book.missing(digest) if record.status == "waiting" else {},
            "results": {k: d for k, d in record.results.items() if role in getattr(job, _RESULT_ROLES[k])},
            "queries": record.queries,
        }

    def _download(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        job, kind = self._own(party, fields), fields.get("kind")
        results = self._tell(job, party)["results"]
        if kind not in results:
            raise ConsentError("no such result for this party", got=f"{len(results)} results for it")
        path = self._book.store.path(results[kind])
        with path.open("rb") as file:
            reply = serve_piece(fields, file, path.stat().st_size)
        if fields.get("offset") == 0:
            self._book.note("fetched", job, party.fingerprint, result=str(kind))
        return reply

    def _log(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        start = fields.get("start")
        if type(start) is not int:
            raise ProtocolError("log without a start")
        with self._book.state.lock:  # a head that covers exactly what is committed
            head = self._book.log.signed_head(self._book.state.identity)
            return {"head": head}, self._book.log.lines(start)

    def _generate(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Reply:
        digest = self._own(party, fields)
        job, record = self._book.signed(digest).job, self._book.record(digest)
        if job.role_of(party.fingerprint) not in job.queries_by:
            raise ConsentError("the job gives this party no queries")
        if record.status != "done":
            raise UsageError("the job is not done", got=record.status, hint="obfuscatune job watch")
        if time.time() >= job.expires:
            raise ConsentError("job has expired", hint="make a new one, and let both sign it")
        tokens = fields.get("max_new_tokens")
        if type(tokens) is not int or not 1 <= tokens <= 65_536:
            raise UsageError("max_new_tokens", expected="1 to 65536")
        query = Query(digest, _prompts(payload), tokens)
        self._book.count_queries(digest, party.fingerprint, len(query.prompts))
        self._ask(query)
        if not query.done.wait(self._wait):
            raise ObfuscatuneError("the enclave is busy", hint="ask again when the running job is done")
        if query.error is not None:
            raise query.error
        return {}, json.dumps(query.completions, ensure_ascii=False).encode()

    def _own(self, party: PublicIdentity, fields: dict[str, Any]) -> str:
        """Return the digest of the job that a request names, if the party has a role in it."""
        digest = fields.get("job")
        # One answer for a job that is not there and for one of others.
        if not isinstance(digest, str) or digest not in self._book.jobs_of(party.fingerprint):
            raise UsageError("no such job of this party", hint="obfuscatune job submit")
        return digest


def _prompts(payload: bytes) -> list[str]:
    """Return the prompts of a query: a JSON list of strings."""
    problem: FormatError | None = None
    if len(payload) > MAX_PROMPT_BYTES:
        raise FormatError("prompts are too long", got=f"{len(payload)} bytes", expected=f"at most {MAX_PROMPT_BYTES}")
    prompts: Any = None
    try:
        prompts = json.loads(payload)
    except (ValueError, RecursionError):
        problem = FormatError("prompts are not JSON")
    if problem is not None:  # outside the handler: the decoder's exception holds the text
        raise problem
    fits = isinstance(prompts, list) and 1 <= len(prompts) <= MAX_PROMPTS
    if not fits or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise FormatError("not a list of prompts", expected=f"1 to {MAX_PROMPTS} texts")
    return list(prompts)
