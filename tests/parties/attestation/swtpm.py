"""A software TPM (swtpm) in a process of its own, for the tests of the TPM's attester and verifier."""

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_SECONDS = 30.0
MISSING = [name for name in ("swtpm", "tpm2_quote") if shutil.which(name) is None]


class SoftwareTpm:
    """One simulated TPM: its state directory, and a process while it runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tcti = f"swtpm:path={directory / 'tpm'}"  # tpm2-tools finds the control socket beside it: tpm.ctrl

    @contextmanager
    def running(self) -> Iterator[None]:
        """Power it on, and off at the end: its PCRs start anew, what is persistent stays."""
        sockets = [self.directory / "tpm", self.directory / "tpm.ctrl"]
        command = [
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.directory}"),
            *("--server", f"type=unixio,path={sockets[0]}", "--ctrl", f"type=unixio,path={sockets[1]}"),
            *("--flags", "not-need-init,startup-clear"),
        ]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # noqa: S603
            try:
                self._wait(process)
                yield
            finally:
                process.terminate()
                process.wait(_SECONDS)
                for path in sockets:
                    path.unlink(missing_ok=True)

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        """Until the control socket, which is made last, takes a connection."""
        while process.poll() is None:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(self.directory / "tpm.ctrl"))
                    return
                except (FileNotFoundError, ConnectionRefusedError):
                    continue
        raise RuntimeError(f"swtpm ended with status {process.returncode}")

    def run(self, *command: str) -> bytes:
        """Run a program of tpm2-tools as anybody with access to the TPM could."""
        environment = {"PATH": "/usr/bin:/bin", "TPM2TOOLS_TCTI": self.tcti}
        done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=_SECONDS)  # noqa: S603
        return done.stdout

    def extend(self, pcr: int) -> None:
        self.run("tpm2_pcrextend", f"{pcr}:sha256={'ab' * 32}")


@contextmanager
def new_tpm() -> Iterator[SoftwareTpm]:
    """Make a TPM that is off; skips the test where there is no swtpm or no tpm2-tools."""
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}")
    # Not pytest's directory: the path of a unix socket has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="swtpm-") as directory:
        yield SoftwareTpm(Path(directory))
