"""What `protect` returns: the model, its report, and the end of its session."""

import weakref
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.enclave.remote.held import OPTIMIZERS, HeldAdapter, RemoteOptimizer
from obfuscatune.enclave.report import Report, make_report
from obfuscatune.enclave.session import Session
from obfuscatune.errors import UsageError, WorkerFault
from obfuscatune.profiles import Profile


class Protected:
    """A model that runs between enclave and worker; a context manager that ends the session and a spawned worker.

    Attributes:
        model: the very object that was protected, of its old class: ``forward``, ``generate``, ``Trainer`` and PEFT's
            ``save_pretrained`` work as before.
        profile: the resolved record. secret: the master secret, for a checkpoint; never leaves the enclave.
    """

    def __init__(
        self,
        model: nn.Module,
        profile: Profile,
        session: Session | None,
        held: HeldAdapter | None,
        secret: MasterSecret,
        *,
        total_parameters: int,
        worker_parameters: int,
    ) -> None:
        self.model, self.profile, self.session, self.secret = model, profile, session, secret
        self._held = held
        self._total_parameters, self._worker_parameters = total_parameters, worker_parameters
        self._final_report: Report | None = None
        if session is not None:
            # The model's end, not this object's: `protect(model).model` alone keeps running.
            weakref.finalize(model, session.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def create_optimizer(self, kind: str = "adamw", *, lr: float, **options: Any) -> torch.optim.Optimizer:
        """Return the optimizer of what is trained, wherever it is; for ``Trainer(optimizers=(optimizer, None))``.

        Only needed with ``lora_placement="worker"``; otherwise the Trainer's own optimizer does.

        Args:
            kind: ``adamw`` or ``sgd``. options: of that torch optimizer (weight_decay, betas, momentum, ...).
        """
        if kind not in OPTIMIZERS:
            raise UsageError("optimizer", got=repr(kind), expected=", ".join(OPTIMIZERS))
        slots = [] if self._held is None else self._held.slots
        anchors = {id(slot.anchor) for slot in slots}
        local = [p for p in self.model.parameters() if p.requires_grad and id(p) not in anchors]
        if self._held is not None and slots:
            return RemoteOptimizer(self._held, local, kind=kind, lr=lr, **options)
        return OPTIMIZERS[kind](local, lr=lr, **options)

    def report(self) -> Report:
        """Return what is where, what crossed the boundary, and what it cost."""
        if self._final_report is not None:
            return self._final_report
        # What did not leave, rather than what the model counts now: the biases of remote layers are its buffers.
        total, worker = self._total_parameters, self._worker_parameters
        return make_report(self.profile, self.session, enclave=total - worker, worker=worker, total=total)

    def close(self) -> None:
        """End the session; the worker forgets it all. The model cannot be run after that; may be called again."""
        if self.session is not None and self._final_report is None:
            try:
                if self._held is not None:
                    self._held.pull()
                self._final_report = self.report()
            except (UsageError, WorkerFault):
                self._final_report = None  # the session had ended by a fault, which was raised where it happened
            finally:
                self.session.close()

    def __repr__(self) -> str:
        where = "no worker" if self.session is None else self.session.worker
        return f"Protected({type(self.model).__name__}, profile={self.profile.name!r}, worker={where!r})"
