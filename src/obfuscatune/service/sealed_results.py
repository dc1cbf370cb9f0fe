"""A job's results, sealed to those who get them: checkpoints to the enclave itself, the report to the data's owner."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from obfuscatune.enclave.protected import Protected
from obfuscatune.parties import quotas
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.job import SignedJob
from obfuscatune.parties.sealed.archive import seal_files
from obfuscatune.parties.sealed.fields import Kind
from obfuscatune.parties.terms import Terms
from obfuscatune.service.placement import Placed
from obfuscatune.service.results import training_report
from obfuscatune.service.store import Store
from obfuscatune.training.checkpoints import save_adapter
from obfuscatune.training.data import Prompt, completed_row

Write = Callable[[Callable[[], str]], str]  # does what writes a sealed file; it may wait until the disk has room


class SealedResults:
    """Where the results of one run of a job go. Each method returns a digest, and raises ConsentError beyond a quota.

    Args:
        identity: the enclave's. store: of the sealed files. signed: the job. terms: of its inputs, by kind.
        write: see `Write`. checkpoint: digest of the one that the run resumes from.
    """

    def __init__(
        self,
        identity: Identity,
        store: Store,
        signed: SignedJob,
        terms: Mapping[str, Terms],
        write: Write,
        checkpoint: str | None = None,
    ) -> None:
        self._identity, self._store, self._signed, self._terms, self._write = identity, store, signed, terms, write
        # Bytes by kind.
        self._stored = {} if checkpoint is None else {"checkpoint": store.path(checkpoint).stat().st_size}

    def checkpoint(self, path: Path) -> str:
        """Seal a checkpoint to the enclave: it holds the master secret of the keys."""
        return self._seal("checkpoint", _files(path), [self._identity.public])

    def adapter(self, protected: Protected, ram: Path) -> str:
        """Seal the adapter to those whom the job gives it, and to the enclave, which answers queries with it."""
        path = ram / "result"
        model: Any = protected.model
        # Whoever gets the adapter knows its base by the sealed file; the name that the model had here means nothing.
        model.peft_config["default"].base_model_name_or_path = f"sealed:{self._signed.job.model}"
        save_adapter(model, path)
        return self._seal("adapter", _files(path), [*self._parties(self._signed.job.adapter_to), self._identity.public])

    def generations(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> str:
        """Seal the completed prompts."""
        rows = [completed_row(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        recipients = self._parties(self._signed.job.generations_to) or [self._identity.public]
        return self._seal("output", {"generations.jsonl": lines.encode()}, recipients)

    def report(self, history: list[dict[str, Any]], parts: Sequence[Placed], waited: float) -> str:
        """Seal what tells whether the training worked to the owner alone: losses tell of the data."""
        report = training_report(self._signed.job, history, parts, waited)
        return self._seal("report", {"report.json": report}, self._parties(["owner"]))

    def _seal(self, kind: Kind, files: dict[str, Path | bytes], recipients: list[PublicIdentity]) -> str:
        def seal(path: Path) -> str:
            digest = seal_files(path, files, kind=kind, sender=self._identity, recipients=recipients)
            self._stored[kind] = path.stat().st_size  # of a checkpoint the last: the one before is dropped
            quotas.require(self._terms, "max_stored_bytes", sum(self._stored.values()))
            return digest

        return self._write(lambda: self._store.put(kind, seal))

    def _parties(self, roles: Sequence[Any]) -> list[PublicIdentity]:
        return [public for role in roles if (public := self._signed.party(role)) is not None]


def _files(directory: Path) -> dict[str, Path | bytes]:
    return {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}
