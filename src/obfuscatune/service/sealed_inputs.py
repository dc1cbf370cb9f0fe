"""A job's sealed inputs, opened in memory. The disk may have changed since they were agreed to: each is verified."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from obfuscatune.durable import private
from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.errors import FormatError, SealError
from obfuscatune.parties import quotas
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.job import Job
from obfuscatune.parties.sealed.archive import SealedArchive
from obfuscatune.parties.sealed.fields import Kind
from obfuscatune.parties.sealed.header import read_header
from obfuscatune.parties.sealed.reader import SealedReader
from obfuscatune.parties.terms import Terms
from obfuscatune.service.store import Store
from obfuscatune.training.checkpoints import load_checkpoint
from obfuscatune.training.data import Prompt, read_prompts
from obfuscatune.training.origin import check_origin

MAX_DATA_BYTES = 4 << 30
HELD_OUT_FILE = "held_out.jsonl"  # in sealed data: rows to evaluate on and not to train on


class SealedInputs:
    """What an enclave can open of a store.

    Args:
        identity: the enclave's. store: of the sealed files. former: enclaves that have handed over to this one: they
            open what was sealed to those.
    """

    def __init__(self, identity: Identity, store: Store, former: Sequence[Identity] = ()) -> None:
        self._identity, self._store = identity, store
        self._former = {each.public.fingerprint: each for each in former}

    def open(self, digest: str, kind: Kind) -> SealedReader:
        """Open a sealed file by its digest.

        Raises:
            SealError: another file lies in its place, or it is not sealed to this enclave.
        """
        path = self._store.path(digest)
        names = [recipient.fingerprint for recipient in read_header(path).header.recipients] if self._former else []
        former = next((self._former[name] for name in names if name in self._former), self._identity)
        reader = SealedReader(path, self._identity if self._identity.public.fingerprint in names else former)
        if reader.digest != digest or reader.header.kind != kind:
            reader.close()
            raise SealError("a sealed file was exchanged on the disk", got=reader.digest, expected=digest)
        return reader

    def terms_of(self, job: Job) -> dict[str, Terms]:
        """Return the terms of a job's inputs, by kind."""
        found = {}
        for kind, file in job.inputs.items():
            with self.open(file, cast(Kind, kind)) as reader:
                found[kind] = Terms.from_dict(reader.terms, f"terms of the {kind}")
        return found

    def unpack(self, digest: str, kind: Kind, target: Path) -> Path:
        """Put the files of a sealed file into a directory in memory."""
        target.mkdir(mode=0o700, exist_ok=True)
        with self.open(digest, kind) as reader:
            archive = SealedArchive(reader)
            for name in archive.names():
                if "/" in name:
                    raise FormatError(f"a file in a folder, in a sealed {kind}")
                with archive.open(name) as source, open(target / name, "xb", opener=private) as file:
                    shutil.copyfileobj(source, file, 1 << 20)
        return target

    def checkpoint(self, digest: str, ram: Path, job: Job) -> MasterSecret:
        """Put a checkpoint where the Trainer resumes from, and return the secret of its keys.

        Raises:
            UsageError: it is of another run.
        """
        path = self.unpack(digest, "checkpoint", ram / "checkpoint-0")
        step = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        (ram / "run").mkdir(mode=0o700)
        secret, made_with = load_checkpoint(path.rename(ram / "run" / f"checkpoint-{step}"), job.resolved)
        check_origin(made_with, origin_of(job), (), "a sealed checkpoint")
        return secret

    def rows(self, digest: str, kind: Kind, ram: Path) -> tuple[Path, Path | None]:
        """Put the one file of sealed data, or of prompts, into memory; and of data the rows held out, if any are."""
        with self.open(digest, kind) as reader:
            archive = SealedArchive(reader)
            names = archive.names()
            held_out = HELD_OUT_FILE if kind == "data" and HELD_OUT_FILE in names else None
            rest = [name for name in names if name != held_out]
            if len(rest) != 1:
                raise FormatError(f"sealed {kind} of several files", got=len(rest), expected="one JSONL file")
            # Their true names are the owner's business, and do not turn up in an error.
            path = ram / f"{kind}.jsonl"
            path.write_bytes(archive.read(rest[0], MAX_DATA_BYTES))
            if held_out is None:
                return path, None
            evaluation = ram / HELD_OUT_FILE
            evaluation.write_bytes(archive.read(held_out, MAX_DATA_BYTES))
        return path, evaluation

    def prompts(self, job: Job, ram: Path, terms: Mapping[str, Terms]) -> list[Prompt]:
        """Read the job's prompts; how many they are nobody but the owner could see before.

        Args:
            job: which. ram: directory in memory. terms: of its inputs, by kind: each one's `max_queries` holds.

        Raises:
            ConsentError: more than one of them allows, with the queries that the job allows later.
        """
        if job.prompts is None:
            return []
        path, _ = self.rows(job.prompts, "prompts", ram)
        prompts = [prompt for _, prompt in read_prompts(path)]
        path.unlink()
        parts = f"{len(prompts)} in the file and {job.max_queries} later"
        quotas.require(terms, "max_queries", len(prompts) + job.max_queries, parts)
        return prompts


def origin_of(job: Job) -> dict[str, Any]:
    """Return what a job's run is made of: its digest is over model, data and settings."""
    return {"job": job.digest}
