"""Start a worker: ``python -m obfuscatune.worker --listen ADDRESS`` (or on a socket inherited from the enclave)."""

import argparse
import contextlib
import logging
import signal
import socket
import sys

import torch

from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.protocol import Address, Connection, Limits, address_of, close_listener, listen
from obfuscatune.worker.server import serve_connection, serve_forever


def run(
    *, listen_on: str | None = None, fd: int | None = None, device: str = "cpu", threads: int | None = None
) -> None:
    """Serve on an address until interrupted, or on an inherited socket until the enclave closes it.

    Raises:
        UsageError: bad address, port taken, or a device that this machine does not have.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = _device(device)
    if fd is not None:
        # The terminal's Ctrl-C goes to the whole process group. The enclave decides; the worker leaves when it closes.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        serve_connection(Connection(socket.socket(fileno=fd), peer="enclave"), chosen)
        return
    if listen_on is None:
        raise UsageError("no address to listen on", hint="for instance --listen unix:///run/worker.sock")
    address = Address.parse(listen_on)
    # A stopped service leaves as after Ctrl-C: its socket file would otherwise stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    listener = listen(address)
    print(f"worker listening on {address_of(listener)} ({chosen})", flush=True)  # the port that port 0 became
    try:
        with contextlib.suppress(KeyboardInterrupt):
            serve_forever(listener, chosen, Limits())
    finally:
        close_listener(listener, address)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError("device not available", got=name, hint="obfuscatune doctor lists devices") from error
    return device


def main() -> int:
    """Parse the options and serve; 2 for misuse."""
    parser = argparse.ArgumentParser(prog="python -m obfuscatune.worker", description=__doc__)
    parser.add_argument("--listen", metavar="ADDRESS", help="unix://PATH or tcp://HOST:PORT")
    parser.add_argument("--fd", type=int, help="an inherited, connected socket")
    parser.add_argument("--device", default="cpu", help="for instance cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's default otherwise")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        run(listen_on=options.listen, fd=options.fd, device=options.device, threads=options.threads)
    except ObfuscatuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
