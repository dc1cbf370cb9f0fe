"""kill -9 at random points of many jobs: what was committed stays, what was counted is counted once, all jobs end."""

import multiprocessing
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from obfuscatune.parties.job import SignedJob
from obfuscatune.service.log import check
from obfuscatune.service.records import USED_UP

from .jobs import CLINIC, Enclave, open_enclave, terms_of
from .platforms import FileCounter, MemoryPlatform

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
KILLS, JOBS, STEPS = 20, 40, 3  # jobs enough that no machine has done them all before the last kill
OWNER = CLINIC.public.fingerprint


class WholeCounter(FileCounter):
    """As a platform's: never half written."""

    def increment(self) -> int:
        count = self.read() + 1
        beside = self.path.with_suffix(".new")
        beside.write_text(str(count))
        beside.replace(self.path)
        return count


def work(directory: Path, platform: MemoryPlatform, jobs: list[SignedJob], told: int) -> None:
    """Run all jobs from where they are, and write a line of each thing once the book has returned."""

    def tell(*words: object) -> None:
        os.write(told, (" ".join(map(str, words)) + "\n").encode())

    with open_enclave(directory, platform) as enclave:
        tell("open")
        book = enclave.book
        for signed in jobs:
            if book.record(signed.job.digest).status not in USED_UP:
                enclave.submit(signed)
        while (digest := book.next()) is not None:
            for step in range(book.record(digest).checkpoint_step + 1, STEPS + 1):
                book.checkpointed(digest, step, enclave.result("checkpoint"))
                tell("checkpoint", digest, step)
            book.finished(digest, {"adapter": enclave.result("adapter")})
            tell("done", digest, 1)
        for signed in jobs:  # asked again after a kill, a question costs nothing
            for number in range(2):
                book.questions.count(signed.job.digest, OWNER, 1, 1, f"{number:064x}")
                tell("query", signed.job.digest, number + 1)


def holds(enclave: Enclave, told: str, file: str, earlier: bytes) -> bytes:
    """Check what was told against the book and the log; return the log's lines."""
    book = enclave.book
    for line in told.splitlines():
        if line == "open":
            continue
        event, digest, number = line.split()
        record = book.record(digest)
        assert record.status == "done" or (event == "checkpoint" and record.checkpoint_step >= int(number)), line
        assert event != "query" or record.queries >= int(number)
    used = [record for record in book.records.values() if record.used]
    assert book.uses.count_of(file) == len(used)
    head, lines = book.committed_log(0)
    check(lines, head, enclave.state.identity.public, earlier)
    ended = Counter(entry.job for entry in enclave.events() if entry.event == "done")
    assert set(ended.values()) <= {1}
    return lines


@pytest.mark.slow
def test_20_kills_at_random_points(tmp_path: Path) -> None:
    generator, fork = random.Random(20), multiprocessing.get_context("fork")
    platform, told = MemoryPlatform(counter=WholeCounter(tmp_path / "counter")), tmp_path / "told"
    with open_enclave(tmp_path, platform) as enclave:
        file, path = enclave.seal("data", terms=terms_of(max_jobs=JOBS))  # one counted twice would refuse the last
        enclave.store(file, path)
        jobs = [enclave.signed_job(data=file) for _ in range(JOBS)]
        for signed in jobs:
            enclave.submit(signed)
    lines, killed = b"", 0
    handle = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for turn in range(KILLS + 1):
        before, more = told.stat().st_size, generator.randrange(1, 5)
        child = fork.Process(target=work, args=(tmp_path, platform, jobs, handle))
        child.start()
        if turn < KILLS:
            while told.read_bytes().count(b"\n", before) < more and child.is_alive():
                time.sleep(0.0005)
            child.join(generator.uniform(0, 0.004))
            child.kill()
            child.join()
            killed += child.exitcode == -9
        else:
            child.join(60)
            assert child.exitcode == 0
        with open_enclave(tmp_path, platform) as enclave:
            lines = holds(enclave, told.read_text(), file, lines)
    os.close(handle)
    with open_enclave(tmp_path, platform) as enclave:
        assert [enclave.book.record(signed.job.digest).status for signed in jobs] == ["done"] * JOBS
        assert [enclave.book.record(signed.job.digest).queries for signed in jobs] == [2] * JOBS
    assert killed == KILLS
