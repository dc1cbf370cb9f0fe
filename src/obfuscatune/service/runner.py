"""Running one job: sealed inputs in, a protected fine-tuning in memory, sealed results out.

Plain content is in this process's memory and, where a library wants a path, in a directory in memory; on the disk there
are sealed files only. The checkpoints hold the master secret of the keys and are sealed to the enclave itself.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from obfuscatune.enclave.families import family_of
from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.protected import Protected
from obfuscatune.errors import ConsentError, SealError, UsageError, WorkerFault
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.parties.sealed.archive import SealedArchive
from obfuscatune.service.fine_tuning import Hooks, train
from obfuscatune.service.generation import Enough, Row, compute
from obfuscatune.service.memory import require_memory, require_memory_of_job
from obfuscatune.service.model import open_model
from obfuscatune.service.placement import Workers, placed
from obfuscatune.service.queries import Query
from obfuscatune.service.results import complete_prompts, named
from obfuscatune.service.scratch import ram_directory
from obfuscatune.service.sealed_inputs import SealedInputs
from obfuscatune.service.sealed_results import SealedResults
from obfuscatune.service.store import Store
from obfuscatune.training.arguments import add_adapter
from obfuscatune.training.chat import spells_special
from obfuscatune.training.completion import prompt_ids, stop_tokens

RAM_PREFIX = "obfuscatune-enclave"


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
        self._inputs = SealedInputs(identity, store, former)
        self._identity, self._store, self._workers, self._timeout = identity, store, workers, timeout
        self._worker_identity, self._insecure = worker_identity or identity, insecure
        self._alive: contextlib.ExitStack | None = None
        self._loaded: tuple[str, Protected, Any] | None = None  # job, model, tokenizer
        self._running = False

    def run(self, signed: SignedJob, checkpoint: str | None, hooks: Hooks) -> dict[str, str]:
        """Train, complete the job's prompts, and return the digests of the sealed results by kind.

        Args:
            signed: a job that was agreed to. checkpoint: digest of the one to resume from. hooks: whom to tell.

        Raises:
            ObfuscatuneError: the worker failed, an input breaks its format, the model cannot be run exactly.
            ConsentError: beyond a quota of anybody's terms, more prompts too.
        """
        job, terms = signed.job, self._inputs.terms_of(signed.job)
        sealed = SealedResults(self._identity, self._store, signed, terms, hooks.store, checkpoint)
        self.close()  # a job is not refused memory for the sake of queries; they are, see `_opened`
        sizes = [self._store.path(file).stat().st_size for file in job.inputs.values()]
        require_memory_of_job(sum(sizes), remote=job.resolved.remote)
        with self._runs(), self._open(job, checkpoint) as (protected, tokenizer, ram, keep):
            hooks.placed(placed(job, protected.links))
            # Now, because their fault should not cost a training.
            prompts = self._inputs.prompts(job, ram, terms)
            prompt_ids(protected.model.config, tokenizer, named(prompts), job.max_new_tokens)
            files = self._inputs.rows(job.data, "data", ram)
            history = train(job, protected, tokenizer, ram, files, terms=terms, seal=sealed.checkpoint, hooks=hooks)
            protected.model.eval()
            results = {"adapter": sealed.adapter(protected, ram)}
            results["report"] = sealed.report(history, placed(job, protected.links), hooks.between())
            if job.prompts is not None:
                found = complete_prompts(protected, tokenizer, prompts, job.max_new_tokens, hooks.between)
                results["output"] = sealed.generations(prompts, [each.text for each in found])
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
            secret = None if checkpoint is None else self._inputs.checkpoint(checkpoint, ram, job)
            reader = stack.enter_context(self._inputs.open(job.model, "model"))
            opened = open_model(SealedArchive(reader), ram, job.dtype)
            if adapter is None:
                _check_targets(job, opened.model.config)
                model = add_adapter(opened.model, job.settings)
            else:
                from obfuscatune.training.loading import load_adapter

                model = load_adapter(opened.model, str(self._inputs.unpack(adapter, "adapter", ram / "adapter"))).eval()
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
        with self._inputs.open(job.model, "model") as reader:
            weights = reader.payload_bytes
        require_memory(weights, self._workers.of(job), remote=job.resolved.remote)


def _check_targets(job: Job, config: Any) -> None:
    """Refuse LoRA but on the layers of the blocks: on the head or an embedding it would tell of their weights."""
    if set(job.settings.targets()) - set(family_of(config).layer_names()):  # whose names are the provider's
        raise ConsentError("LoRA on other layers than those of the blocks")
