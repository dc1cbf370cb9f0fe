"""What `protect` returns: the model, its report, and the end of its sessions."""

import weakref
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.enclave.lifetime import close_all
from obfuscatune.enclave.links import Link
from obfuscatune.enclave.remote.held_adapter import HeldAdapter
from obfuscatune.enclave.remote.optimizer import OPTIMIZERS, RemoteOptimizer
from obfuscatune.enclave.report import Report, make_report
from obfuscatune.enclave.session import Session
from obfuscatune.enclave.sharing.statement import describe
from obfuscatune.enclave.sharing.workers import Workers
from obfuscatune.errors import NotFiniteError, UsageError, WorkerFault
from obfuscatune.profiles import Profile

CLOSING_SECONDS = 60.0  # for all last replies together: numbers, and factors that a failed step did not bring


class Protected:
    """A model that runs between enclave and workers; a context manager that ends the sessions and spawned workers.

    Attributes:
        model: the very object that was protected, of its old class: ``forward``, ``generate``, ``Trainer`` and PEFT's
            ``save_pretrained`` work as before.
        profile: the resolved record, as it fits the model. asked: the same before it was fitted: what a resumed run is
            asked for again. links: its workers. secret: the master secret, for a checkpoint; never leaves the
            enclave.
    """

    def __init__(
        self,
        model: nn.Module,
        profile: Profile,
        links: list[Link],
        held: HeldAdapter | None,
        secret: MasterSecret,
        *,
        total_parameters: int,
        asked: Profile | None = None,
        sharing: tuple[Workers, list[str]] | None = None,
    ) -> None:
        self.model, self.profile, self.secret = model, profile, secret
        self.asked = asked or profile
        self.links = links
        self._held = held
        self._total_parameters, self._sharing = total_parameters, sharing
        self._final_report: Report | None = None
        if held is not None and held.slots:
            # Of all optimizers of the process, until the model has gone.
            weakref.finalize(model, held.refuse_stock_optimizers(RemoteOptimizer).remove)
        for link in links:
            # The model's end, not this object's: `protect(model).model` alone keeps running.
            weakref.finalize(model, link.session.close)

    @property
    def session(self) -> Session | None:
        """The session with the first worker; None where there is none."""
        return self.links[0].session if self.links else None

    @property
    def has_ended(self) -> bool:
        """Whether a worker is lost that cannot be done without: nothing can be computed any more."""
        lost = sum(link.session.has_ended for link in self.links)
        return lost > (0 if self._sharing is None else self._sharing[0].scheme.spares)

    def warnings(self) -> list[str]:
        """Return what makes the profile's claim void here, as far as addresses tell: shares on one machine."""
        return [] if self._sharing is None else describe(*self._sharing).warnings()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except (WorkerFault, NotFiniteError, UsageError) as fault:  # the first error is the one to tell
            error.add_note(f"closing failed too: {fault.what}")

    def create_optimizer(self, kind: str = "adamw", *, lr: float, **options: Any) -> torch.optim.Optimizer:
        """Return the optimizer of what is trained, wherever it is; for ``Trainer(optimizers=(optimizer, None))``.

        Only needed with ``lora_placement="worker"``; otherwise the Trainer's own optimizer does.

        Args:
            kind: ``adamw`` or ``sgd``. options: of that torch optimizer (weight_decay, betas, momentum, ...).

        Raises:
            UsageError: no such optimizer or option, or nothing requires a gradient.
        """
        if kind not in OPTIMIZERS:
            raise UsageError("optimizer", got=repr(kind), expected=", ".join(OPTIMIZERS))
        slots = [] if self._held is None else self._held.slots
        held = {id(parameter) for slot in slots for parameter in slot.parameters()}
        local = [p for p in self.model.parameters() if p.requires_grad and id(p) not in held]
        if not local and not any(slot.trained() for slot in slots):
            raise UsageError(
                "nothing of the model requires a gradient",
                hint="PeftModel.from_pretrained freezes an adapter unless is_trainable=True is given",
            )
        if self._held is not None and slots:
            return RemoteOptimizer(self._held, local, kind=kind, lr=lr, **options)
        return OPTIMIZERS[kind](local, lr=lr, **options)

    def report(self) -> Report:
        """Return what is where, what crossed the boundary, and what it cost."""
        if self._final_report is not None:
            return self._final_report
        return make_report(self.profile, self.links, total=self._total_parameters, sharing=self._sharing)

    def close(self) -> None:
        """End all sessions; the workers forget it all. The model cannot be run after that; may be called again.

        Workers that do not answer any more are waited for `CLOSING_SECONDS` at most, all of them together.

        Raises:
            WorkerFault: a worker failed only now; the sessions have ended. LoRA that it trained is as of the last step.
            NotFiniteError: after a step that failed so, the factors are not finite; the sessions have ended.
            UsageError: values were written to LoRA after a step that failed; the sessions have ended.
        """
        sessions = [link.session for link in self.links]
        if self._final_report is not None or not sessions or self.has_ended:
            # A fault was raised where it happened; what the workers had is lost since then.
            close_all(sessions)
            return
        try:
            for session in sessions:
                session.limit(CLOSING_SECONDS)
            if self._held is not None:
                self._held.pull()
            self._final_report = self.report()
        finally:
            close_all(sessions)

    def __repr__(self) -> str:
        where = ", ".join(link.session.worker for link in self.links) or "no worker"
        return f"Protected({type(self.model).__name__}, profile={self.profile.name!r}, worker={where!r})"
