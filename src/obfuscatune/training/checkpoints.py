"""What is written to disk: the adapter, in one piece or not at all, and checkpoints that hold their own keys.

A checkpoint is the Trainer's own directory ``checkpoint-N`` with two files more: the master secret, without which the
state of an optimizer on the worker means nothing; and a record of what it is: the profile, what the run was made of,
and the digest of every file. The secret opens everything that the worker has seen: a checkpoint is as private as the
data.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from obfuscatune.durable import rename, sync, write_private
from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.profiles import Profile
from obfuscatune.training.finite import check_adapter_file

SECRET_FILE = "master_secret"  # noqa: S105 - a file's name
RECORD_FILE = "obfuscatune.json"  # written last, so a checkpoint that has it was written to its end
_NAME = re.compile(r"checkpoint-(\d+)")
# PEFT reads the configuration first, so it comes last: an adapter without one is not taken for an adapter.
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)
_TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream", "No space")


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run that were written to their end, oldest first."""
    numbered = [(int(m[1]), path) for path in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered) if (path / RECORD_FILE).is_file()]


def keep_last(limit: int, *kept: Path) -> None:
    """Remove the oldest whole checkpoints beside ``kept``, so that no more than ``limit`` are left, or these.

    Raises: as `remove_checkpoints`.
    """
    others = [path for path in checkpoints(kept[0].parent) if path not in kept]
    for path in others[: max(0, len(others) - max(0, limit - len(kept)))]:
        _remove(path)


def remove_checkpoints(output_dir: Path) -> None:
    """Remove all checkpoints of an earlier run, whole or not; of one that is a link, the link; and no file.

    Raises:
        ObfuscatuneError: one cannot be removed.
    """
    for path in output_dir.glob("checkpoint-*"):
        if _NAME.fullmatch(path.name) and (path.is_symlink() or path.is_dir()):
            _remove(path)


def _remove(path: Path) -> None:
    try:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        raise ObfuscatuneError("cannot remove a checkpoint", got=error.strerror, where=str(path)) from error


def find_checkpoint(resume: str, output_dir: Path) -> Path:
    """Return the checkpoint that ``--resume_from_checkpoint`` names: a path, or ``true`` or ``last`` for the newest.

    Raises:
        UsageError: there is none, or it was not written to its end.
    """
    if resume.lower() in ("true", "last"):
        found = checkpoints(output_dir)
        if not found:
            raise UsageError("no checkpoint to resume from", where=str(output_dir), hint="start without it")
        return found[-1]
    path = Path(resume)
    if path.resolve() not in [found.resolve() for found in checkpoints(path.parent)]:
        raise UsageError("not a whole checkpoint of a protected run", got=resume, expected="a directory checkpoint-N")
    return path


def secret_file(checkpoint: Path, rank: int = 0) -> Path:
    """Return where a process of a run keeps its master secret: each has keys of its own."""
    return checkpoint / (SECRET_FILE if rank == 0 else f"{SECRET_FILE}_{rank}")


def load_checkpoint(checkpoint: Path, profile: Profile, rank: int = 0) -> tuple[MasterSecret, dict[str, Any]]:
    """Return the master secret of a checkpoint made under the profile's switches, and what its run was made of.

    Every file is compared with the digest that the checkpoint has of it. The digests are no signature: they find what
    was damaged, not what somebody has changed who may write there.

    A process that the checkpointed run had not (``rank``) takes the first one's secret.

    Raises:
        UsageError: the checkpoint was made under other switches, whose keys are others; or a file of it is missing,
            damaged, or cannot be read.
    """
    path = checkpoint / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        name, made_under = str(record["profile"]), dict(record["switches"])
        made_with, files = dict(record["made_with"]), dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        hint = "it is damaged, or of an older version: start the run again"
        raise UsageError("the checkpoint does not say what it is", where=str(path), hint=hint) from None
    asked = _describe(profile)["switches"]
    differing = sorted(switch for switch in {*made_under, *asked} if made_under.get(switch) != asked.get(switch))
    if differing:
        got, expected = (
            ", ".join(f"{switch}={switches.get(switch)}" for switch in differing) for switches in (made_under, asked)
        )
        raise UsageError(
            "checkpoint of another profile", got=f"{name} with {got}", expected=expected, where=str(checkpoint)
        )
    _check_files(checkpoint, files)
    own = secret_file(checkpoint, rank)
    return MasterSecret.load(own if own.exists() else secret_file(checkpoint)), made_with


def _check_files(checkpoint: Path, digests: dict[str, Any]) -> None:
    present = _file_names(checkpoint)
    for fault, names in (
        ("is missing", digests.keys() - present),
        ("is none of its own", present - digests.keys()),
        ("is damaged", {name for name in present & digests.keys() if _digest(checkpoint / name) != digests[name]}),
    ):
        if names:
            where, hint = str(checkpoint), "resume from an older checkpoint"
            raise UsageError(f"a file of the checkpoint {fault}", got=", ".join(sorted(names)), where=where, hint=hint)


def _file_names(checkpoint: Path) -> set[str]:
    # Directories too: the Trainer would load an adapter that it finds in one.
    return {path.name for path in checkpoint.iterdir() if path.name != RECORD_FILE}


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError("cannot read the checkpoint", got=error.strerror, where=str(path)) from None


def _describe(profile: Profile) -> dict[str, Any]:
    """The profile in a record, as JSON gives it back."""
    described: dict[str, Any] = json.loads(json.dumps({"profile": profile.name, "switches": profile.switches()}))
    return described


@contextlib.contextmanager
def new_checkpoint(path: Path, secret: MasterSecret) -> Iterator[None]:
    """Put the keys into a new checkpoint, which the body then writes; what fails to be written whole is removed.

    It is none before `finish_checkpoint`.

    Raises:
        ObfuscatuneError: the disk is full, or the directory cannot be written.
    """
    with _all_or_nothing(path, "checkpoint"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        secret.save(path / SECRET_FILE)
        yield


def finish_checkpoint(path: Path, profile: Profile, made_with: Mapping[str, Any]) -> None:
    """Write what the checkpoint is, when all of its files are there: profile, run, and the digest of each file.

    All of it is on the disk then: an older checkpoint may be removed after it.

    Raises: as `new_checkpoint`, and what is there is removed too.
    """
    with _all_or_nothing(path, "checkpoint"):
        files = {name: _digest(path / name) for name in sorted(_file_names(path))}
        for name in files:
            sync(path / name)
        sync(path)
        record = {**_describe(profile), "made_with": dict(made_with), "files": files}
        write_private(path / f".{RECORD_FILE}", (json.dumps(record) + "\n").encode())
        rename(path / f".{RECORD_FILE}", path / RECORD_FILE)
        sync(path.parent)


def save_adapter(model: Any, output_dir: Path) -> None:
    """Write the PEFT adapter: beside its place first, then renamed into it.

    Raises:
        ObfuscatuneError: the disk is full, or the directory cannot be written; an older adapter there is as it was,
            unless the disk fails between the renames, which leave no adapter that loads.
        TrainingError: a factor is not finite.
    """
    output_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".adapter-", dir=output_dir))
    with _all_or_nothing(temporary, "adapter"):
        # Left to itself, PEFT adds the base model's whole embedding where LoRA is on the head, or where a configuration
        # that it finds by the model's name, on this disk or on the hub, has another vocabulary.
        model.save_pretrained(temporary, save_embedding_layers=False)
        check_adapter_file(temporary / _ADAPTER_FILES[0])
        for name in _ADAPTER_FILES:
            sync(temporary / name)
        sync(output_dir)  # where a file system cannot do that, nothing has changed yet
        # First no configuration: new weights under an older one would load without a word, at another scale.
        (output_dir / _ADAPTER_FILES[1]).unlink(missing_ok=True)
        sync(output_dir)
        for name in _ADAPTER_FILES:
            rename(temporary / name, output_dir / name)
    shutil.rmtree(temporary)


@contextlib.contextmanager
def _all_or_nothing(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        if not _is_failed_write(error):
            raise
        # Of a library's words those of the system alone: the rest may quote what was to be written.
        known = next((words for words in map(os.strerror, _DISK_ERRORS) if words in str(error)), None)
        reason = getattr(error, "strerror", None) or known or "a file that could not be written to its end"
        hint = "free some space, or choose another --output_dir"
        raise ObfuscatuneError(f"cannot save the {what}", got=reason, where=str(path.parent), hint=hint) from error


def _is_failed_write(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):  # torch.save's, for a full disk; it has no class of its own
        return any(part in str(error) for part in _TORCH_WRITE_ERRORS)
    return isinstance(error, OSError | SafetensorError)
