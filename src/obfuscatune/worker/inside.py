"""The worker's own process: it listens at an inherited socket, or serves one enclave, or follows rank 0 of a group."""

import argparse
import contextlib
import importlib
import os
import signal
import socket
from dataclasses import replace

import torch

from obfuscatune.errors import ProtocolError, UsageError
from obfuscatune.protocol.address import address_of
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.memory import keep_freed_memory
from obfuscatune.protocol.tls import Credentials, worker_context
from obfuscatune.worker import outside
from obfuscatune.worker.acceptor import Acceptor, Bounds, die_with_parent
from obfuscatune.worker.budget import budget_of_each, free_bytes
from obfuscatune.worker.child import Service
from obfuscatune.worker.parallel import Group, follow
from obfuscatune.worker.server import serve_connection
from obfuscatune.worker.session import WorkerSession
from obfuscatune.worker.torchrun import ENDING_SECONDS, rank_and_size


def run(options: argparse.Namespace) -> None:
    """Be the process that these options of the command line name, to its end. Raises UsageError."""
    keep_freed_memory()
    if options.fd is not None:
        _serve_enclave(options.fd, options.device, options.threads)
    elif options.follow:
        _follow(options)
    else:
        _serve(options)


def _serve(options: argparse.Namespace) -> None:
    """Serve at an inherited listening socket until interrupted."""
    die_with_parent(os.getppid())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    credentials = None if options.credentials is None else outside.read_credentials(options.credentials)
    free = _free(options.device)
    each = int(options.memory_gb * 1e9) if options.memory_gb else budget_of_each(free, options.max_sessions)
    context = None if credentials is None else worker_context(credentials)
    service = Service(_own(options.device), options.threads, each, context)
    # The first optimizer of a process makes torch import this, 1 s, and its first backward a part of it, 0.3 s.
    # Sessions are forks of this process.
    importlib.import_module("torch._dynamo")
    listener = socket.socket(fileno=options.listener)
    ending_seconds = ENDING_SECONDS if rank_and_size()[1] > 1 else 0.0
    acceptor = Acceptor(listener, service, Bounds(max_sessions=options.max_sessions, ending_seconds=ending_seconds))
    shown = _shown(listener, credentials)
    sessions = "1 session" if options.max_sessions == 1 else f"{options.max_sessions} sessions"
    # The port is the one that port 0 became, and the fingerprint makes it what an enclave is given.
    print(f"worker listening on {shown} ({options.device}, {sessions} of {each / 1e9:.1f} GB)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        acceptor.serve()


def _interrupt(number: int, _frame: object) -> None:
    """End the worker. torchrun and the process around this one both say so: the second time changes nothing."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _shown(listener: socket.socket, credentials: Credentials | None) -> str:
    address = address_of(listener)
    return str(address if credentials is None else replace(address, tls=True, fingerprint=credentials.fingerprint))


def _serve_enclave(fd: int, device: str, threads: int | None) -> None:
    """Serve the enclave at the other end of an inherited socket until it closes."""
    if threads is not None:
        torch.set_num_threads(threads)
    _free(device)
    # Ctrl-C and a scheduler's SIGTERM go to the whole group. The enclave decides; the worker leaves when it closes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    serve_connection(Connection(socket.socket(fileno=fd), peer="enclave"), torch.device(device))


def _follow(options: argparse.Namespace) -> None:
    """Be a process beside the one that listens, under torchrun."""
    device = _own(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # of torchrun, whose Ctrl-C it is
    budget = int(options.memory_gb * 1e9) if options.memory_gb else None

    def serve(group: Group) -> None:
        session = WorkerSession(device, budget, group)
        while (request := group.take()) is not None:
            with contextlib.suppress(ProtocolError):  # rank 0 answers with the same
                session.handle(*request)

    follow(device, serve)


def _own(name: str) -> torch.device:
    """The device of this process: under torchrun ``cuda`` is one for each."""
    local = os.environ.get("LOCAL_RANK")
    return torch.device(f"cuda:{local}" if name == "cuda" and local is not None else name)


def _free(name: str) -> int:
    """Return the bytes that a device has free, asked in a process of its own: CUDA does not survive a fork.

    Raises:
        UsageError: this machine has no such device.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            device = torch.device(name)
            torch.ones(1, device=device).cpu()  # a device without numbers, such as meta, is none
            os.write(writer, str(free_bytes(device)).encode())
        except BaseException:  # said by silence: nothing may run on in a copy of this process
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    if not told:
        raise UsageError("device not available", got=name, hint="obfuscatune doctor lists devices")
    return int(told)
