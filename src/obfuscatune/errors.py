"""The errors a caller can meet: what happened, what was got, what was expected, where, and a hint.

No message, and no attribute of an error, ever holds a key, a prompt, a label or an activation: only names, shapes,
dtypes, counts and paths. Both sides of the boundary import this module; it knows nothing of either.
"""

from typing import Any

_MAX_SHOWN = 2000


def printable(value: Any, *, most: int = _MAX_SHOWN, keep: str = "") -> str:
    """Return a text for a terminal, a page or a line of a log.

    A name out of another party's file could clear the terminal, or forge a line of a log: control characters are
    escaped, but for those in ``keep``, and what is longer than ``most`` characters is cut.
    """
    text = str(value)
    text = text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class ObfuscatuneError(Exception):
    """Base of all errors of the package, rendered as ``what: got ..., expected ... (where)`` and a hint line.

    Args:
        what: one plain sentence fragment without a period, for instance ``"unknown profile"``.
        got: what was met, already safe to show.
        expected: what would have been right.
        where: layer path, ``file:line``, option or address.
        hint: what to try next.
    """

    def __init__(
        self,
        what: str,
        *,
        got: Any = None,
        expected: Any = None,
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.got, self.expected, self.where, self.hint = what, got, expected, where, hint
        parts = [f"got {printable(got)}"] if got is not None else []
        parts += [f"expected {printable(expected)}"] if expected is not None else []
        text = f"{printable(what)}: {', '.join(parts)}" if parts else printable(what)
        text += f" (at {printable(where)})" if where else ""
        text += f"\nhint: {printable(hint)}" if hint else ""
        super().__init__(text)


class UsageError(ObfuscatuneError, ValueError):
    """An option, a value or a file is not what it must be; the command line exits with 2."""


class UnsupportedModelError(UsageError):
    """This model, adapter or use of it cannot be protected exactly, so it is refused rather than approximated."""


class DataError(UsageError):
    """A row of a data file is not in one of the known formats; ``where`` is ``file:line``."""


class KeyFaultError(ObfuscatuneError):
    """A key failed its own check (orthogonality, condition number) or a secret was used in a forbidden way."""


class BusyError(ObfuscatuneError):
    """The other side has no room or no time for this now; nothing was done, and it can be tried again."""


class StorageError(ObfuscatuneError):
    """A disk takes or gives nothing: full, over a quota, broken. What was asked for can be tried again."""


class ProtocolError(ObfuscatuneError):
    """The peer sent bytes that break the protocol; the connection is closed and nothing of it is used."""


class ConnectionClosedError(ProtocolError):
    """The peer closed the connection, in the middle of a frame or between two."""


class FormatError(UsageError):
    """A file or message of another party (sealed file, identity, job, policy, evidence, log) breaks its format."""


class SealError(FormatError):
    """A sealed file was changed, cut or made by somebody else, or is not sealed to us; none of it is used."""


class AttestationError(ObfuscatuneError):
    """Evidence is missing, forged, stale, or refused by the policy; names the rule that failed."""


class ConsentError(ObfuscatuneError):
    """The enclave refuses what an owner has not agreed to: an option, a profile, an expired, used or unsigned job."""


class RollbackError(ObfuscatuneError):
    """The state on disk is older than the one that the enclave wrote last: somebody put back a copy."""


class NotFiniteError(ObfuscatuneError):
    """A number on its way to the worker, or back, is NaN or infinite; names the layer, and accuses nobody.

    It is of the model, of the data or of a run that diverged: an honest worker's product of large numbers overflows as
    the plain model's does. Nothing of it is used, and the session goes on.
    """


class TrainingError(ObfuscatuneError):
    """The numbers of a training run, or of its result, are not finite, or no step had an effect: there is no result."""


# A worker that runs may be serving others, whose runs a restart would end.
RESTART_HINT = "start the worker again if it is gone, and resume from the last checkpoint"


class WorkerFault(ObfuscatuneError):  # noqa: N818 - a fault of the peer, and the name users see
    """The worker died, was late, or replied with something wrong; names worker, layer and call.

    The session is closed when this is raised: no later reply of that worker is ever used.
    """

    def __init__(self, what: str, *, worker: str, layer: str, call: int, **details: Any) -> None:
        self.worker, self.layer, self.call = worker, layer, call
        details.setdefault("hint", RESTART_HINT)
        super().__init__(what, where=f"worker {worker}, layer {layer}, call {call}", **details)


# What to try with a model or a file of weights that is refused.
ONLY_INSIDE = 'profile="enclave" runs a model as it is; docs/models.md says what the other profiles run'
UNQUANTIZED = "load or save the model in float32, bfloat16 or float64"
OWN_CONFIG = "is config.json the one of this model"
SAVE_AGAIN = "save the model again with save_pretrained"
