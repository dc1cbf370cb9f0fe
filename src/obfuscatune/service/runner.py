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
from obfuscatune.errors import ConsentError, FormatError, SealError, UsageError, WorkerFault
from obfuscatune.parties import quotas
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.parties.sealed.archive import SealedArchive, seal_files
from obfuscatune.parties.sealed.fields import Kind
from obfuscatune.parties.sealed.header import read_header
from obfuscatune.parties.sealed.reader import SealedReader
from obfuscatune.parties.terms import Terms
from obfuscatune.service.generation import Enough, Row, compute
from obfuscatune.service.memory import require_memory, require_memory_of_job
from obfuscatune.service.model import open_model
from obfuscatune.service.placement import Placed, Workers, placed
from obfuscatune.service.queries import Query
from obfuscatune.service.results import complete_prompts, named, training_report
from obfuscatune.service.scratch import ram_directory
from obfuscatune.service.store import Store
from obfuscatune.training.arguments import add_adapter, training_arguments
from obfuscatune.training.chat import spells_special
from obfuscatune.training.checkpoints import load_checkpoint, save_adapter
from obfuscatune.training.completion import prompt_ids, stop_tokens
from obfuscatune.training.data import Prompt, completed_row, read_prompts, read_rows
from obfuscatune.training.encoding import Collator, encode_rows, vocabulary_of
from obfuscatune.training.origin import check_origin
from obfuscatune.training.trainer import ProtectedTrainer

MAX_DATA_BYTES = 4 << 30
HELD_OUT_FILE = "held_out.jsonl"  # in sealed data: rows to evaluate on and not to train on
RAM_PREFIX = "obfuscatune-enclave"


@dataclass(frozen=True)
class Hooks:
    """Whom the runner tells: ``progress(step, steps)``, ``checkpoint(step, digest)``, and what each worker has got.

    ``store(act)`` returns what ``act`` does, which writes a sealed file: it may wait until the disk has room.
    ``between()`` is called where the job can stand still for the queries of others, which it lets be answered; it
    returns the seconds of this so far.
    """

    progress: Callable[[int, int], None]
    checkpoint: Callable[[int, str], None]
    placed: Callable[[Sequence[Placed]], None]
    store: Callable[[Callable[[], str]], str] = lambda act: act()
    between: Callable[[], float] = lambda: 0.0


class Runner:
    """Runs jobs one at a time, in the thread that calls it, and keeps one model for queries, beside the job too.

    Args:
        identity: the enclave's. store: of the sealed files. workers: whom the operator offers. timeout: seconds for
            each of a worker's replies. worker_identity: by which a ``tls://`` worker knows the enclave, its own by
            default. insecure: as of `protect`. former: of enclaves that have handed over to this one: they open what
            was sealed to those.
    """

    def __init__(
        self,
        identity: Identity,
        store: Store,
        *,
        workers: Workers,
        timeout: float = 600.0,
        worker_identity: Identity | None = None,
        insecure: bool = False,
        former: Sequence[Identity] = (),
    ) -> None:
        self._former = {each.public.fingerprint: each for each in former}
        self._identity, self._store, self._workers, self._timeout = identity, store, workers, timeout
        self._worker_identity, self._insecure = worker_identity or identity, insecure
        self._alive: contextlib.ExitStack | None = None
        self._loaded: tuple[str, Protected, Any] | None = None  # job, model, tokenizer
        self._write = Hooks.store
        self._terms: dict[str, Terms] = {}  # of the inputs of the job that runs
        self._stored: dict[str, int] = {}  # bytes of its sealed files, by kind
        self._running = False

    def run(self, signed: SignedJob, checkpoint: str | None, hooks: Hooks) -> dict[str, str]:
        """Train, complete the job's prompts, and return the digests of the sealed results by kind.

        Args:
            signed: a job that was agreed to. checkpoint: digest of the one to resume from. hooks: whom to tell.

        Raises:
            ObfuscatuneError: the worker failed, an input breaks its format, the model cannot be run exactly.
            ConsentError: more prompts than the provider's terms allow, or beyond a quota of anybody's.
        """
        job, self._write = signed.job, hooks.store
        self._terms = {kind: self._terms_of(file, kind) for kind, file in job.inputs.items()}
        self._stored = {} if checkpoint is None else {"checkpoint": self._store.path(checkpoint).stat().st_size}
        self.close()  # a job is not refused memory for the sake of queries; they are, see `_opened`
        sizes = [self._store.path(file).stat().st_size for file in job.inputs.values()]
        require_memory_of_job(sum(sizes), remote=job.resolved.remote)
        with self._runs(), self._open(job, checkpoint) as (protected, tokenizer, ram, keep):
            hooks.placed(placed(job, protected.links))
            prompts = self._prompts(job, ram)  # now, because their fault should not cost a training
            prompt_ids(protected.model.config, tokenizer, named(prompts), job.max_new_tokens)
            history = self._train(job, protected, tokenizer, ram, hooks)
            protected.model.eval()
            results = {"adapter": self._seal_adapter(signed, protected, ram)}
            results["report"] = self._seal_report(signed, history, placed(job, protected.links), hooks.between())
            if job.prompts is not None:
                results["output"] = self._seal_generations(signed, protected, tokenizer, prompts, hooks.between)
            if job.queries_by:
                keep()
        return results

    def check(self, signed: SignedJob, adapter: str, query: Query) -> list[Row]:
        """Load the trained model of a job that is done, unless it is there, and return the rows of a query that fits.

        Nothing is computed. Raises as :meth:`run`, BusyError where the model does not fit beside a job that runs, and
        UsageError for a prompt, after which the model is still there.
        """
        protected, tokenizer = self._opened(signed, adapter)
        prompts = named(query.prompts)
        if (query.streaming or query.settings.stop) and not tokenizer.is_fast:
            got = type(tokenizer).__name__
            raise UsageError("the tokenizer can neither stream nor stop at texts", got=got, where="prompt 1")
        for where, prompt in prompts:
            if not isinstance(prompt, str) and spells_special(tokenizer, prompt) is not None:
                raise UsageError("a message spells a special token", where=where)
        ids = prompt_ids(protected.model.config, tokenizer, prompts, 1)  # a completion has what the context has left
        positions = getattr(protected.model.config, "max_position_embeddings", None)
        return [Row(query, where, row, tokenizer, positions) for (where, _), row in zip(prompts, ids, strict=True)]

    def answer(self, signed: SignedJob, adapter: str, rows: Sequence[Row], enough: Enough) -> None:
        """Compute one round of rows that were checked, with the trained model of a job that is done.

        The model stays, whatever a query does. Where the worker has gone since it was opened, it is opened once more,
        and the rows go on with what they have. Raises as :meth:`run`.
        """
        for last in (False, True):
            protected, tokenizer = self._opened(signed, adapter)
            live = [row for row in rows if not row.done]
            try:
                if live:
                    ends = stop_tokens(protected.model, tokenizer)
                    compute(protected.model, tokenizer, live, ends, enough)
                return
            except (WorkerFault, UsageError):  # the second where the session had ended before
                if last:
                    raise
                self.close()

    @contextlib.contextmanager
    def _runs(self) -> Iterator[None]:
        self._running = True
        try:
            yield
        finally:
            self._running = False

    def _opened(self, signed: SignedJob, adapter: str) -> tuple[Protected, Any]:
        """Return the model of a job and its tokenizer, opened if it is not."""
        if self._loaded is None or self._loaded[0] != signed.job.digest:
            self.close()
            if self._running:
                self._require_memory(signed.job)
            with self._open(signed.job, None, adapter) as (_, _, _, keep):
                keep()
        if self._loaded is None:
            raise SealError("the model of the job is not loaded")
        return self._loaded[1:]

    @property
    def kept(self) -> str | None:
        """The digest of the job whose model is kept for queries."""
        return None if self._loaded is None else self._loaded[0]

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
        profile = job.resolved
        workers = self._workers.of(job)
        with contextlib.ExitStack() as stack:
            ram = stack.enter_context(ram_directory(RAM_PREFIX))
            secret = None if checkpoint is None else self._unpack_checkpoint(checkpoint, ram, profile, job)
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
                    worker=workers,
                    timeout=self._timeout,
                    identity=self._worker_identity,
                    insecure=self._insecure,
                    # The place may be that of the job that runs, which stands still meanwhile.
                    queue=not self._running or adapter is None,
                    secret=secret,
                )
            )
            reader.close()

            def keep() -> None:
                self.close()
                self._alive, self._loaded = stack.pop_all(), (job.digest, protected, opened.tokenizer)

            yield protected, opened.tokenizer, ram, keep

    def _require_memory(self, job: Job) -> None:
        with self._reader(job.model, "model") as reader:
            weights = reader.payload_bytes
        require_memory(weights, self._workers.of(job), remote=job.resolved.remote)

    def _reader(self, digest: str, kind: Kind) -> SealedReader:
        """Open a sealed input; the disk may have changed since it was agreed to."""
        path = self._store.path(digest)
        names = [recipient.fingerprint for recipient in read_header(path).header.recipients] if self._former else []
        former = next((self._former[name] for name in names if name in self._former), self._identity)
        reader = SealedReader(path, self._identity if self._identity.public.fingerprint in names else former)
        if reader.digest != digest or reader.header.kind != kind:
            reader.close()
            raise SealError("a sealed file was exchanged on the disk", got=reader.digest, expected=digest)
        return reader

    def _terms_of(self, digest: str, kind: Any) -> Terms:
        """The terms of a sealed input."""
        with self._reader(digest, kind) as reader:
            return Terms.from_dict(reader.terms, f"terms of the {kind}")

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

    def _unpack_checkpoint(self, digest: str, ram: Path, profile: Any, job: Job) -> MasterSecret:
        path = self._unpack(digest, "checkpoint", ram / "checkpoint-0")
        step = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        (ram / "run").mkdir(mode=0o700)
        secret, made_with = load_checkpoint(path.rename(ram / "run" / f"checkpoint-{step}"), profile)
        check_origin(made_with, _origin(job), (), "a sealed checkpoint")
        return secret

    def _rows(self, digest: str, kind: Kind, ram: Path) -> tuple[Path, Path | None]:
        """Put the one file of sealed data, or of prompts, into memory; and of data the rows held out, if any are."""
        with self._reader(digest, kind) as reader:
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

    def _prompts(self, job: Job, ram: Path) -> list[Prompt]:
        """Read the job's prompts; how many they are nobody but the owner could see before."""
        if job.prompts is None:
            return []
        path, _ = self._rows(job.prompts, "prompts", ram)
        prompts = [prompt for _, prompt in read_prompts(path)]
        path.unlink()
        allowed = self._terms["model"].max_queries
        if len(prompts) + job.max_queries > allowed:
            got = f"{len(prompts)} in the file and {job.max_queries} later"
            raise ConsentError("more prompts than the model's terms allow", got=got, expected=f"at most {allowed}")
        return prompts

    # the steps of a job

    def _train(self, job: Job, protected: Protected, tokenizer: Any, ram: Path, hooks: Hooks) -> list[dict[str, Any]]:
        """Train, and return the Trainer's log: losses, and evaluations where rows are held out."""
        settings = job.settings
        config: Any = protected.model.config
        positions = getattr(config, "max_position_embeddings", settings.max_length)
        rows, held_out = [
            None if path is None else _encoded(path, tokenizer, min(settings.max_length, positions), config)
            for path in self._rows(job.data, "data", ram)
        ]
        tokens = quotas.training_tokens(settings, 0 if rows is None else len(rows))
        quotas.require(self._terms, "max_training_tokens", tokens or 0)
        found = sorted((ram / "run").glob("checkpoint-*"))
        trainer = ProtectedTrainer(
            protected,
            kind=settings.optim,
            # The first evaluation is before the first step, and in the checkpoints.
            args=training_arguments(
                settings,
                str(ram / "run"),
                report_to="none",
                eval_on_start=held_out is not None,
                logging_first_step=True,
            ),
            quiet=True,  # the terminal is the operator's
            made_with=_origin(job),
            train_dataset=rows,
            eval_dataset=held_out,
            data_collator=Collator(tokenizer.pad_token_id),
        )
        trainer.add_callback(_SealCheckpoints(self._seal_checkpoint, hooks))
        trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
        if held_out is not None:
            trainer.evaluate()
        return list(trainer.state.log_history)

    def _seal_checkpoint(self, path: Path) -> str:
        return self._seal("checkpoint", _files(path), [self._identity.public])

    def _seal_adapter(self, signed: SignedJob, protected: Protected, ram: Path) -> str:
        path = ram / "result"
        model: Any = protected.model
        # Whoever gets the adapter knows its base by the sealed file; the name that the model had here means nothing.
        model.peft_config["default"].base_model_name_or_path = f"sealed:{signed.job.model}"
        save_adapter(model, path)
        recipients = _parties(signed, signed.job.adapter_to)
        # To the enclave too: it answers queries with it after a restart.
        return self._seal("adapter", _files(path), [*recipients, self._identity.public])

    def _seal_generations(
        self,
        signed: SignedJob,
        protected: Protected,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        between: Callable[[], Any],
    ) -> str:
        job = signed.job
        found = complete_prompts(protected, tokenizer, prompts, job.max_new_tokens, between)
        completions = [each.text for each in found]
        rows = [completed_row(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        recipients = _parties(signed, job.generations_to) or [self._identity.public]
        return self._seal("output", {"generations.jsonl": lines.encode()}, recipients)

    def _seal_report(
        self, signed: SignedJob, history: list[dict[str, Any]], parts: Sequence[Placed], waited: float
    ) -> str:
        """Seal what tells whether the training worked to the owner alone: losses tell of the data."""
        report = training_report(signed.job, history, parts, waited)
        return self._seal("report", {"report.json": report}, _parties(signed, ["owner"]))

    def _seal(self, kind: Kind, files: dict[str, Path | bytes], recipients: list[PublicIdentity]) -> str:
        def seal(path: Path) -> str:
            digest = seal_files(path, files, kind=kind, sender=self._identity, recipients=recipients)
            self._stored[kind] = path.stat().st_size  # of a checkpoint the last: the one before is dropped
            quotas.require(self._terms, "max_stored_bytes", sum(self._stored.values()))
            return digest

        return self._write(lambda: self._store.put(kind, seal))


def _origin(job: Job) -> dict[str, Any]:
    """What a job's run is made of: its digest is over model, data and settings."""
    return {"job": job.digest}


def _check_targets(job: Job, config: Any) -> None:
    """Refuse LoRA but on the layers of the blocks: on the head or an embedding it would tell of their weights."""
    known = set(family_of(config).layer_names())
    others = sorted(set(job.settings.targets()) - known)
    if others:
        raise ConsentError("LoRA on other layers than those of the blocks", expected=", ".join(sorted(known)))


class _SealCheckpoints(TrainerCallback):
    """Seals each checkpoint that the Trainer has written into memory, and removes it there; tells of each step.

    The last step is logged like the first: the owner is told how far the loss has come, however short the job is.
    """

    def __init__(self, seal: Callable[[Path], str], hooks: Hooks) -> None:
        self._seal, self._hooks = seal, hooks

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._hooks.progress(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._hooks.progress(state.global_step, state.max_steps)
        control.should_log |= state.global_step >= state.max_steps
        self._hooks.between()

    def on_substep_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._hooks.between()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._hooks.between()

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not path.exists():  # the last one, for which memory has no room: the adapter is made without it
            return
        digest = self._seal(path)
        shutil.rmtree(path)
        self._hooks.checkpoint(state.global_step, digest)


def _encoded(path: Path, tokenizer: Any, max_length: int, config: Any) -> Any:
    """The rows of a file in memory, which is removed."""
    rows, _ = encode_rows(read_rows(path), tokenizer, max_length, vocabulary=vocabulary_of(config))
    path.unlink()
    return rows


def _files(directory: Path) -> dict[str, Path | bytes]:
    return {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}


def _parties(signed: SignedJob, roles: Sequence[Any]) -> list[PublicIdentity]:
    return [public for role in roles if (public := signed.party(role)) is not None]
