"""The programs of tpm2-tools, run one after another on one TPM: no shell, bounded output, nothing left in the TPM.

A TPM has room for about three loaded objects and three sessions. A program ends, what it loaded stays, and the fourth
fails with error 0x902. Linux's resource manager (``/dev/tpmrm0``) cleans up after each program; a simulator's socket
does not. So every piece of work here ends by flushing what is loaded.
"""

import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from obfuscatune.errors import AttestationError

# Named, because the programs' own choice without one ends at simulators' ports, which anybody here could open.
_DEFAULT_TCTI = "device:/dev/tpmrm0"
_SECONDS = 60.0  # a discrete TPM takes seconds for a new key
_MAX_OUTPUT_BYTES = 64 * 1024
_HANDLE = re.compile(rb"^- (0x[0-9A-Fa-f]{1,8})$", re.MULTILINE)
_TPM_ERROR = re.compile(rb"\((0x[0-9A-Fa-f]{1,8})\)")


class Tools:
    """tpm2-tools on the TPM that the environment's TPM2TOOLS_TCTI names, otherwise on ``/dev/tpmrm0``."""

    def __init__(self) -> None:
        self.tcti = os.environ.get("TPM2TOOLS_TCTI", _DEFAULT_TCTI)
        self._lock = threading.RLock()

    @contextmanager
    def work(self) -> Iterator[Path]:
        """Yield a private directory for the programs' files; one thread at a time, the TPM is flushed afterwards."""
        with self._lock, tempfile.TemporaryDirectory(prefix="obfuscatune-tpm-") as directory:
            try:
                yield Path(directory)
            finally:
                for what in ("--transient-object", "--loaded-session"):
                    with suppress(AttestationError):  # the fault to report is the one that came before
                        self.run("tpm2_flushcontext", what)

    def run(self, program: str, *arguments: str | Path) -> bytes:
        """Run one program and return its standard output, at most 64 KiB.

        Raises:
            AttestationError: it is not installed, fails (with the TPM's error code where it tells one), takes longer
                than a minute, or says more than that. Nothing of its output is in the message.
        """
        path = shutil.which(program)
        if path is None:
            raise AttestationError("program is not installed", got=program, hint="install tpm2-tools")
        environment = {"PATH": os.environ.get("PATH", os.defpath), "TPM2TOOLS_TCTI": self.tcti}
        command = [path, *map(str, arguments)]
        with tempfile.TemporaryFile() as complaints:
            try:
                process = subprocess.Popen(  # noqa: S603 - a program of tpm2-tools, by its full path
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, env=environment
                )
            except OSError as error:
                raise AttestationError("program cannot be run", got=error.strerror, where=program) from None
            output = _read(process)
            complaints.seek(0)
            found = _TPM_ERROR.search(complaints.read(_MAX_OUTPUT_BYTES))
        if process.returncode != 0 or len(output) > _MAX_OUTPUT_BYTES:
            got = f"TPM error {found[1].decode()}" if found else f"exit status {process.returncode}"
            hint = "is there a TPM? TPM2TOOLS_TCTI names one, for instance device:/dev/tpmrm0"
            raise AttestationError("the TPM's program failed", got=got, where=program, hint=None if found else hint)
        return output

    def has(self, kind: str, handle: str) -> bool:
        """Whether a handle (``0x81018F01``) of a kind (``handles-persistent``, ``handles-nv-index``) is in use."""
        found = _HANDLE.findall(self.run("tpm2_getcap", kind))
        return int(handle, 16) in {int(text, 16) for text in found}


def _read(process: "subprocess.Popen[bytes]") -> bytes:
    """Return at most one byte more than allowed, and leave the process ended."""
    timer = threading.Timer(_SECONDS, process.kill)
    timer.start()
    with process:
        try:
            output = process.stdout.read(_MAX_OUTPUT_BYTES + 1) if process.stdout else b""
            if len(output) > _MAX_OUTPUT_BYTES:
                process.kill()
            process.wait()
        finally:
            timer.cancel()
    return output
