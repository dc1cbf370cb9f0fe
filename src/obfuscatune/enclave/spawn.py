"""Getting a worker: a process of our own on a socket pair, or one that already listens at an address."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obfuscatune.enclave.session import Session
from obfuscatune.errors import AttestationError, ConnectionClosedError, ProtocolError, UsageError, WorkerFault
from obfuscatune.protocol.address import Address, connect
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.limits import Limits
from obfuscatune.protocol.tls import connect_tls, enclave_context, reason
from obfuscatune.protocol.waiting import WAITING

if TYPE_CHECKING:
    from obfuscatune.parties.identity import Identity

_HANDSHAKE_SECONDS = 30.0


def open_session(
    worker: str,
    *,
    timeout: float,
    threads: int | None,
    device: str | None,
    identity: "Identity | str | Path | None" = None,
    insecure: bool = False,
    queue: bool = True,
) -> Session:
    """Return a session with a new worker (``"spawn"``) or with the one at an address; no request is sent yet.

    Args:
        identity: this enclave's, for ``tls://``; the worker must allow it. insecure: whether ``tcp://`` may leave this
            machine. queue: whether the session waits where the worker's places are taken.

    Raises:
        UsageError: bad address, no worker there, one that does not know the identity, or options that only a spawned
            worker can take.
        AttestationError: the worker has another identity than the address names.
    """
    address = _check(worker, threads, device, identity, insecure)
    if address is None:
        return _spawn(timeout=timeout, threads=threads, device=device or "cpu")
    if address.tls:
        connection = _connect_secured(address, timeout, _identity(identity))
    else:
        connection = Connection(connect(address, timeout=timeout), limits=Limits(), peer=str(address))
    return Session(connection, worker=str(address), timeout=timeout, queue=queue)


def check_workers(
    workers: Iterable[str],
    *,
    threads: int | None,
    device: str | None,
    identity: "Identity | str | Path | None",
    insecure: bool,
) -> "Identity | None":
    """Refuse what `open_session` would, before a model is read and any worker is asked.

    Returns:
        The identity for links under TLS, so that its passphrase is asked for once; None where there are none.

    Raises:
        UsageError: bad address, one without the worker's fingerprint, no identity for ``tls://``, or options that only
            a spawned worker can take.
    """
    addresses = [_check(worker, threads, device, identity, insecure) for worker in workers]
    if not any(address is not None and address.tls for address in addresses):
        return None
    return _identity(identity)


def _identity(given: Any) -> "Identity":
    from obfuscatune.parties.identity import Identity

    return given if isinstance(given, Identity) else Identity.load(Path(given))


def _check(worker: str, threads: int | None, device: str | None, identity: Any, insecure: bool) -> Address | None:
    """Return the address, or None for ``"spawn"``."""
    if worker == "spawn":
        return None
    if threads is not None or device is not None:
        raise UsageError(
            "threads and device of a worker at an address are set where it is started",
            where=worker,
            hint="obfuscatune worker --listen ADDRESS --device DEVICE --threads N",
        )
    address = Address.of_worker(worker, insecure, "insecure=True (--insecure)")
    if address.tls and identity is None:
        hint = 'obfuscatune identity new lab, then identity="lab.key" (--identity lab.key), and lab.pub to the worker'
        raise UsageError("tls:// needs an identity of this enclave", where=worker, hint=hint)
    return address


def _connect_secured(address: Address, timeout: float, own: "Identity") -> Connection:
    """Connect under TLS: when this returns, each side knows the other, and nothing of a session was sent."""
    from obfuscatune.parties.link import check_worker, credentials_of

    where = str(address)
    context = enclave_context(credentials_of(own, "enclave"))
    sock = connect(address, timeout=timeout)
    try:
        sock.settimeout(min(timeout, _HANDSHAKE_SECONDS))
        secured = connect_tls(sock, context, where)
    except (OSError, ProtocolError) as error:
        sock.close()
        got = error.what if isinstance(error, ProtocolError) else reason(error)
        hint = "is it an obfuscatune worker that listens at tls://"
        raise UsageError("no TLS with the worker", got=got, where=where, hint=hint) from None
    try:
        check_worker(secured.getpeercert(binary_form=True), address.fingerprint, where)
    except AttestationError:
        secured.close()
        raise
    connection = Connection(secured, limits=Limits(), peer=where)
    connection.settimeout(min(timeout, _HANDSHAKE_SECONDS))
    try:
        told, _ = connection.receive(max_payload=0)
    except (ConnectionClosedError, TimeoutError) as error:
        connection.close()
        got = "no answer" if isinstance(error, TimeoutError) else error.got
        hint = f"start it with --allow {own.public.name}.pub: this enclave is {own.public.fingerprint}"
        raise UsageError("the worker does not let this identity in", got=got, where=where, hint=hint) from None
    except ProtocolError as error:
        connection.close()
        hint = "is it a worker of this version"
        raise WorkerFault(
            "the reply breaks the protocol", worker=where, layer="-", call=0, got=error.what, hint=hint
        ) from error
    if told.get("ok") is not True:
        connection.close()
        raise UsageError("the worker does not let this identity in", where=where)
    return connection


def _spawn(*, timeout: float, threads: int | None, device: str) -> Session:
    """Start a worker on one end of a socket pair: no file, no port, and it ends when the other end closes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, "-m", "obfuscatune.worker", "--fd", str(theirs.fileno()), "--device", device]
    if threads is not None:
        command += ["--threads", str(threads)]
    environment = {**os.environ, **WAITING}
    try:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    name = f"spawned process {process.pid}"
    connection = Connection(ours, limits=Limits(), peer=name)
    return Session(connection, worker=name, timeout=timeout, process=process)
