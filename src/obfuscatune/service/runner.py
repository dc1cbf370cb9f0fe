"""Running one job: sealed inputs in, a protected fine-tuning in memory, sealed results out.

Plain content is in this process's memory and, where a library wants a path, in a directory in memory; on the disk there
are sealed files only. The checkpoints hold the master secret of the keys and are sealed to the enclave itself.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from obfuscatune.durable import private
from obfuscatune.enclave.families import family_of
from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.protected import Protected
from obfuscatune.errors import ConsentError, FormatError, SealError, UsageError
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.parties.sealed.archive import SealedArchive, seal_files
from obfuscatune.parties.sealed.fields import Kind
from obfuscatune.parties.sealed.reader import SealedReader
from obfuscatune.parties.terms import Terms
from obfuscatune.profiles import resolve
from obfuscatune.service.model import open_model
from obfuscatune.service.scratch import ram_directory
from obfuscatune.service.store import Store
from obfuscatune.training.arguments import add_adapter, training_arguments
from obfuscatune.training.chat import spells_special
from obfuscatune.training.checkpoints import load_keys, save_adapter
from obfuscatune.training.completion import Completion, complete_counted, prompt_ids
from obfuscatune.training.data import Collator, Prompt, completed_row, encode_rows, read_prompts, read_rows
from obfuscatune.training.trainer import ProtectedTrainer

MAX_DATA_BYTES = 4 << 30
_BATCH = 8  # prompts completed together
RAM_PREFIX = "obfuscatune-enclave"


@dataclass(frozen=True)
class Hooks:
    """Whom the runner tells: ``progress(step, steps)``, and ``checkpoint(step, digest)`` of a sealed checkpoint."""

    progress: Callable[[int, int], None]
    checkpoint: Callable[[int, str], None]


class Runner:
    """Runs jobs one at a time, in the thread that calls it, and keeps the last model for queries.

    Args:
        identity: the enclave's. store: of the sealed files. worker: as of `protect`. timeout: seconds for each of the
            worker's replies. worker_identity: by which a ``tls://`` worker knows the enclave, its own by default.
            insecure: as of `protect`.
    """

    def __init__(
        self,
        identity: Identity,
        store: Store,
        *,
        worker: str,
        timeout: float = 600.0,
        worker_identity: Identity | None = None,
        insecure: bool = False,
    ) -> None:
        self._identity, self._store, self._worker, self._timeout = identity, store, worker, timeout
        self._worker_identity, self._insecure = worker_identity or identity, insecure
        self._alive: contextlib.ExitStack | None = None
        self._loaded: tuple[str, Protected, Any] | None = None  # job, model, tokenizer

    def run(self, signed: SignedJob, checkpoint: str | None, hooks: Hooks) -> dict[str, str]:
        """Train, complete the job's prompts, and return the digests of the sealed results by kind.

        Args:
            signed: a job that was agreed to. checkpoint: digest of the one to resume from. hooks: whom to tell.

        Raises:
            ObfuscatuneError: the worker failed, an input breaks its format, the model cannot be run exactly.
            ConsentError: more prompts than the provider's terms allow.
        """
        job = signed.job
        with self._open(job, checkpoint) as (protected, tokenizer, ram, keep):
            prompts = self._prompts(job, ram)  # now, because their fault should not cost a training
            prompt_ids(protected.model.config, tokenizer, _named(prompts), job.max_new_tokens)
            self._train(job, protected, tokenizer, ram, hooks)
            protected.model.eval()
            results = {"adapter": self._seal_adapter(signed, protected, ram)}
            if job.prompts is not None:
                results["output"] = self._seal_generations(signed, protected, tokenizer, prompts)
            if job.queries_by:
                keep()
        return results

    def check(self, signed: SignedJob, adapter: str, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Load the trained model of a job that is done, unless it is there, and check that it takes the prompts.

        Nothing is computed. Raises as :meth:`run`, and UsageError for a prompt, after which the model is still there.
        """
        digest = signed.job.digest
        if self._loaded is None or self._loaded[0] != digest:
            with self._open(signed.job, None, adapter) as (_, _, _, keep):
                keep()
        _, protected, tokenizer = self._kept(digest)
        for where, prompt in _named(prompts):
            if not isinstance(prompt, str) and spells_special(tokenizer, prompt) is not None:
                raise UsageError("a message spells a special token", where=where)
        prompt_ids(protected.model.config, tokenizer, _named(prompts), max_new_tokens)

    def answer(self, digest: str, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Completion]:
        """Complete prompts that were checked. After a failure the model is gone: its session may be out of step."""
        _, protected, tokenizer = self._kept(digest)
        try:
            return _complete(protected, tokenizer, prompts, max_new_tokens)
        except BaseException:
            self.close()
            raise

    def _kept(self, digest: str) -> tuple[str, Protected, Any]:
        if self._loaded is None or self._loaded[0] != digest:
            raise SealError("the model of the job is not loaded")
        return self._loaded

    def close(self) -> None:
        """Forget the model that was kept, and end its session with the worker."""
        alive, self._alive, self._loaded = self._alive, None, None
        if alive is not None:
            alive.close()

    # opening and keeping

    @contextlib.contextmanager
    def _open(
        self, job: Job, checkpoint: str | None, adapter: str | None = None
    ) -> Iterator[tuple[Protected, Any, Path, Callable[[], None]]]:
        """Yield the protected model with its LoRA, the tokenizer, a directory in memory, and how to keep the model."""
        self.close()
        profile = resolve(job.profile, **job.switches)
        with contextlib.ExitStack() as stack:
            ram = stack.enter_context(ram_directory(RAM_PREFIX))
            secret = None if checkpoint is None else self._unpack_checkpoint(checkpoint, ram, profile)
            reader = stack.enter_context(self._reader(job.model, "model"))
            opened = open_model(SealedArchive(reader), ram, job.dtype)
            if adapter is None:
                _check_targets(job, opened.model.config)
                model = add_adapter(opened.model, job.settings)
            else:
                from obfuscatune.training.loading import load_adapter

                model = load_adapter(opened.model, str(self._unpack(adapter, "adapter", ram / "adapter"))).eval()
            protected = stack.enter_context(
                protect(
                    model,
                    profile=profile,
                    worker=self._worker,
                    timeout=self._timeout,
                    identity=self._worker_identity,
                    insecure=self._insecure,
                    secret=secret,
                )
            )
            reader.close()

            def keep() -> None:
                self._alive, self._loaded = stack.pop_all(), (job.digest, protected, opened.tokenizer)

            yield protected, opened.tokenizer, ram, keep

    def _reader(self, digest: str, kind: Kind) -> SealedReader:
        """Open a sealed input; the disk may have changed since it was agreed to."""
        reader = SealedReader(self._store.path(digest), self._identity)
        if reader.digest != digest or reader.header.kind != kind:
            reader.close()
            raise SealError("a sealed file was exchanged on the disk", got=reader.digest, expected=digest)
        return reader

    def _unpack(self, digest: str, kind: Kind, target: Path) -> Path:
        """Put the files of a sealed file into a directory in memory."""
        target.mkdir(mode=0o700, exist_ok=True)
        with self._reader(digest, kind) as reader:
            archive = SealedArchive(reader)
            for name in archive.names():
                if "/" in name:
                    raise FormatError(f"a file in a folder, in a sealed {kind}")
                with archive.open(name) as source, open(target / name, "xb", opener=private) as file:
                    shutil.copyfileobj(source, file, 1 << 20)
        return target

    def _unpack_checkpoint(self, digest: str, ram: Path, profile: Any) -> MasterSecret:
        path = self._unpack(digest, "checkpoint", ram / "checkpoint-0")
        step = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        (ram / "run").mkdir(mode=0o700)
        return load_keys(path.rename(ram / "run" / f"checkpoint-{step}"), profile)

    def _rows(self, digest: str, kind: Kind, ram: Path) -> Path:
        """Put the one file of sealed data, or of prompts, into memory."""
        with self._reader(digest, kind) as reader:
            archive = SealedArchive(reader)
            if len(archive.names()) != 1:
                raise FormatError(
                    f"sealed {kind} of several files", got=len(archive.names()), expected="one JSONL file"
                )
            # Its true name is the owner's business, and does not turn up in an error.
            path = ram / f"{kind}.jsonl"
            path.write_bytes(archive.read(archive.names()[0], MAX_DATA_BYTES))
        return path

    def _prompts(self, job: Job, ram: Path) -> list[Prompt]:
        """Read the job's prompts; how many they are nobody but the owner could see before."""
        if job.prompts is None:
            return []
        path = self._rows(job.prompts, "prompts", ram)
        prompts = [prompt for _, prompt in read_prompts(path)]
        path.unlink()
        with self._reader(job.model, "model") as model:
            allowed = Terms.from_dict(model.terms, "terms of the model").max_queries
        if len(prompts) + job.max_queries > allowed:
            got = f"{len(prompts)} in the file and {job.max_queries} later"
            raise ConsentError("more prompts than the model's terms allow", got=got, expected=f"at most {allowed}")
        return prompts

    # the steps of a job

    def _train(self, job: Job, protected: Protected, tokenizer: Any, ram: Path, hooks: Hooks) -> None:
        settings = job.settings
        path = self._rows(job.data, "data", ram)
        positions = getattr(protected.model.config, "max_position_embeddings", settings.max_length)
        rows, _ = encode_rows(read_rows(path), tokenizer, min(settings.max_length, positions))
        path.unlink()
        found = sorted((ram / "run").glob("checkpoint-*"))
        trainer = ProtectedTrainer(
            protected,
            kind=settings.optim,
            args=training_arguments(settings, str(ram / "run"), report_to="none"),
            quiet=True,  # the terminal is the operator's
            train_dataset=rows,
            data_collator=Collator(tokenizer.pad_token_id),
        )
        trainer.add_callback(_SealCheckpoints(self._seal_checkpoint, hooks))
        trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)

    def _seal_checkpoint(self, path: Path) -> str:
        return self._seal("checkpoint", _files(path), [self._identity.public])

    def _seal_adapter(self, signed: SignedJob, protected: Protected, ram: Path) -> str:
        path = ram / "result"
        save_adapter(protected.model, path)
        recipients = _parties(signed, signed.job.adapter_to)
        # To the enclave too: it answers queries with it after a restart.
        return self._seal("adapter", _files(path), [*recipients, self._identity.public])

    def _seal_generations(
        self, signed: SignedJob, protected: Protected, tokenizer: Any, prompts: Sequence[Prompt]
    ) -> str:
        job = signed.job
        completions = [c.text for c in _complete(protected, tokenizer, prompts, job.max_new_tokens)]
        rows = [completed_row(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        recipients = _parties(signed, job.generations_to) or [self._identity.public]
        return self._seal("output", {"generations.jsonl": lines.encode()}, recipients)

    def _seal(self, kind: Kind, files: dict[str, Path | bytes], recipients: list[PublicIdentity]) -> str:
        return self._store.put(
            kind, lambda path: seal_files(path, files, kind=kind, sender=self._identity, recipients=recipients)
        )


def _check_targets(job: Job, config: Any) -> None:
    """Refuse LoRA but on the layers of the blocks: on the head or an embedding it would tell of their weights."""
    known = set(family_of(config).layer_names())
    others = sorted(set(job.settings.targets()) - known)
    if others:
        raise ConsentError("LoRA on other layers than those of the blocks", expected=", ".join(sorted(known)))


class _SealCheckpoints(TrainerCallback):
    """Seals each checkpoint that the Trainer has written into memory, and removes it there."""

    def __init__(self, seal: Callable[[Path], str], hooks: Hooks) -> None:
        self._seal, self._hooks = seal, hooks

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._hooks.progress(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._hooks.progress(state.global_step, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        digest = self._seal(path)
        shutil.rmtree(path)
        self._hooks.checkpoint(state.global_step, digest)


def _complete(protected: Protected, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Completion]:
    """Greedy completions, in the order of the prompts."""
    named = _named(prompts)
    done: list[Completion] = []
    for start in range(0, len(named), _BATCH):
        batch = named[start : start + _BATCH]
        done += complete_counted(protected.model, tokenizer, batch, max_new_tokens=max_new_tokens, do_sample=False)
    return done


def _named(prompts: Sequence[Prompt]) -> list[tuple[str, Prompt]]:
    return [(f"prompt {number}", prompt) for number, prompt in enumerate(prompts, 1)]


def _files(directory: Path) -> dict[str, Path | bytes]:
    return {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}


def _parties(signed: SignedJob, roles: Sequence[Any]) -> list[PublicIdentity]:
    return [public for role in roles if (public := signed.party(role)) is not None]
