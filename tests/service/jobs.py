"""Two owners, an enclave that holds nothing but its book, and sealed inputs of a few kilobytes."""

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from obfuscatune.parties.identity import Identity
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.parties.sealed.archive import seal_files
from obfuscatune.parties.sealed.writer import SealedWriter
from obfuscatune.service.answers import Answers
from obfuscatune.service.book import Book
from obfuscatune.service.entries import Entry
from obfuscatune.service.log import AuditLog
from obfuscatune.service.queries import Query
from obfuscatune.service.requests import Requests
from obfuscatune.service.state import State
from obfuscatune.service.store import Store

from .platforms import MemoryPlatform, new_platform

# The tests' folders are packages apart; this file is the other one's.
_spec = importlib.util.spec_from_file_location("jobs_of_parties", Path(__file__).parents[1] / "parties" / "jobs.py")
assert _spec is not None and _spec.loader is not None
_jobs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_jobs)
LAB, CLINIC, STRANGER = _jobs.LAB, _jobs.CLINIC, _jobs.STRANGER
job_fields, sign, terms_of = _jobs.job_fields, _jobs.sign, _jobs.terms

CANARY = "the patient Zebediah Quux"
SENDERS = {"model": LAB, "data": CLINIC, "prompts": CLINIC}


@dataclass
class Enclave:
    """A book over a real state, log and store; ``reopen`` is what a kill and a restart do."""

    directory: Path
    platform: MemoryPlatform
    state: State
    log: AuditLog
    book: Book
    requests: Requests
    queries: list[Query] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return self.state.identity.public.fingerprint

    def seal(self, kind: str, sender: Identity | None = None, **more: Any) -> tuple[str, Path]:
        """Seal an input to this enclave; returns its digest and where it is."""
        path = self.directory / f"{kind}-{time.monotonic_ns()}.sealed"
        more.setdefault("terms", terms_of())
        digest = seal_files(
            path,
            {"rows.jsonl": CANARY.encode() * 300},
            kind=kind,  # type: ignore[arg-type]
            sender=sender or SENDERS[kind],
            recipients=[self.state.identity.public],
            chunk_bytes=4096,
            **more,
        )
        return digest, path

    def store(self, digest: str, path: Path) -> None:
        """Put a sealed file into the store, as an upload does."""
        part = self.book.store.begin(digest, path.stat().st_size, LAB.public.fingerprint)
        part.write(0, path.read_bytes())
        part.finish()

    def signed_job(
        self, terms: dict[str, dict[str, Any]] | None = None, *, stored: bool = True, **changes: Any
    ) -> SignedJob:
        """A job signed by both, with its inputs sealed under ``terms`` by kind, and there if ``stored``."""
        given = {"profile": "balanced", "switches": {}, **changes}
        for kind in ("model", "data", "prompts"):
            if kind not in given:
                given[kind], path = self.seal(kind, terms=(terms or {}).get(kind, terms_of()))
                if stored:
                    self.store(given[kind], path)
        return sign(Job(**job_fields(self.fingerprint, **given)))

    def submit(self, signed: SignedJob) -> str:
        return self.book.submit(signed, LAB.public.fingerprint)

    def done_job(self, **changes: Any) -> str:
        """A job that was run; its results are sealed files of this enclave."""
        digest = self.submit(self.signed_job(**changes))
        assert self.book.next() == digest
        self.book.finished(digest, {"adapter": self.result("adapter"), "output": self.result("output")})
        return digest

    def result(self, kind: Any) -> str:
        def write(path: Path) -> str:
            who = self.state.identity
            with SealedWriter(path, kind=kind, sender=who, recipients=[CLINIC.public], payload_bytes=5) as writer:
                writer.write(b"plain")
            return writer.digest

        return self.book.store.put(kind, write)

    def events(self) -> list[Entry]:
        return [Entry.from_bytes(line) for line in self.log.lines(0).splitlines()]

    def told(self) -> list[str]:
        """The events in the log, in order."""
        return [entry.event for entry in self.events()]


@contextmanager
def open_enclave(
    directory: Path, platform: MemoryPlatform | None = None, *, wait: float = 60.0, max_file_bytes: int = 1 << 20
) -> Iterator[Enclave]:
    platform = platform or new_platform()
    with State.open(directory, platform) as state:
        log = AuditLog.open(directory / "log.jsonl", state.log_head, state.log_length)
        queries: list[Query] = []
        try:
            book = Book(state, log, Store(directory / "store", 1 << 26))
            requests = Requests(book, queries.append, Answers(), wait=wait, max_file_bytes=max_file_bytes)
            yield Enclave(directory, platform, state, log, book, requests, queries)
        finally:
            log.close()
