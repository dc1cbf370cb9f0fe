"""Start a worker: ``python -m obfuscatune.worker --listen ADDRESS``, or on a socket that is inherited."""

import argparse
import contextlib
import logging
import signal
import socket
import sys
from typing import get_args

import torch

from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.protocol.address import Address, address_of, close_listener, listen
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.limits import Limits
from obfuscatune.worker import sandbox
from obfuscatune.worker.server import serve_connection, serve_forever


def run(*, listen_on: str, device: str = "cpu", threads: int | None = None, mode: sandbox.Mode = "auto") -> int:
    """Serve on an address until interrupted; return the exit status.

    Args:
        mode: whether the worker runs in a sandbox: see `sandbox.choose`.

    Raises:
        UsageError: bad address, port taken, a device that this machine does not have, or no sandbox to be had.
    """
    address = Address.parse(listen_on)
    # A stopped service leaves as after Ctrl-C: its socket file would otherwise stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    listener = listen(address)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            inside = sandbox.choose(mode, device)
            if inside is not None:
                return inside.serve(listener, device=device, threads=threads)
            _serve(listener, device, threads)
    finally:
        close_listener(listener, address)
    return 0


def _serve(listener: socket.socket, device: str, threads: int | None) -> None:
    chosen = _prepare(device, threads)
    print(f"worker listening on {address_of(listener)} ({chosen})", flush=True)  # the port that port 0 became
    serve_forever(listener, chosen, Limits())


def _serve_enclave(fd: int, device: str, threads: int | None) -> None:
    """Serve the enclave at the other end of an inherited socket until it closes."""
    chosen = _prepare(device, threads)
    # The terminal's Ctrl-C goes to the whole process group. The enclave decides; the worker leaves when it closes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve_connection(Connection(socket.socket(fileno=fd), peer="enclave"), chosen)


def _prepare(device: str, threads: int | None) -> torch.device:
    if threads is not None:
        torch.set_num_threads(threads)
    return _device(device)


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
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--listen", metavar="ADDRESS", help="unix://PATH or tcp://HOST:PORT")
    where.add_argument("--fd", type=int, help="an inherited, connected socket; no sandbox is made around it")
    where.add_argument("--listener", type=int, metavar="FD", help="an inherited, listening socket; no sandbox either")
    parser.add_argument("--device", default="cpu", help="for instance cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's default otherwise")
    parser.add_argument("--sandbox", choices=get_args(sandbox.Mode), default="auto", help="around the worker")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        if options.fd is not None:
            _serve_enclave(options.fd, options.device, options.threads)
        elif options.listener is not None:
            _serve(socket.socket(fileno=options.listener), options.device, options.threads)
        else:
            return run(listen_on=options.listen, device=options.device, threads=options.threads, mode=options.sandbox)
    except ObfuscatuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
