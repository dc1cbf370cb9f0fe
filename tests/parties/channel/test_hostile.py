"""Clients that mean to shut the others out: silent, many, slow, greedy. The honest ones are answered all the same."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from obfuscatune.errors import BusyError, ConnectionClosedError
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.channel import client, connect_attested, conversation, fetch_evidence, frames, server
from obfuscatune.parties.channel.address import TlsAddress
from obfuscatune.parties.identity import Identity

from .attackers import ANY, bare_client, soon
from .conftest import Enclave
from .test_attacks import greet
from .test_server import authenticated


@pytest.fixture(scope="module")
def other() -> Identity:
    return Identity.generate("other")


def connect(enclave: Enclave, identity: Identity, policy: Policy, timeout: float = 20) -> Any:
    return connect_attested(enclave.address, identity=identity, policy=policy, timeout=timeout)


def silent(enclave: Enclave, count: int, stack: contextlib.ExitStack) -> None:
    for _ in range(count):
        stack.enter_context(TlsAddress.parse(enclave.address).connect(20))


def test_silent_strangers_shut_nobody_out(
    start: Callable[..., Enclave], owner: Identity, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than there are places: before the first byte, and after the hello."""
    monkeypatch.setattr(server, "MAX_SILENT", 16)
    enclave = start(max_connections=4)
    with contextlib.ExitStack() as stack:
        silent(enclave, 64, stack)
        with connect(enclave, owner, policy) as channel:
            assert channel.request({"n": 1})[0] == {"echo": {"n": 1}}
        strangers = [stack.enter_context(bare_client(enclave.address)) for _ in range(4)]
        for stream in strangers:
            greet(stream)
        with connect(enclave, owner, policy) as channel:
            assert channel.request({"n": 2})[0] == {"echo": {"n": 2}}
        # The one that has lost its place is told why.
        assert strangers[0].receive(ANY, deadline=soon())[0]["error"] == "busy"


def test_a_party_with_all_places_shuts_nobody_out(
    start: Callable[..., Enclave], owner: Identity, other: Identity, policy: Policy
) -> None:
    enclave = start(max_connections=4, allow=lambda client: client in (owner.public, other.public))
    with contextlib.ExitStack() as stack:
        greedy = [stack.enter_context(connect(enclave, owner, policy)) for _ in range(4)]
        with pytest.raises(BusyError, match="all connections are taken"):
            connect(enclave, owner, policy, timeout=2)
        honest = [stack.enter_context(connect(enclave, other, policy)) for _ in range(2)]
        with pytest.raises(BusyError):  # two of four: its share
            connect(enclave, other, policy, timeout=2)
        for channel in honest:
            assert channel.request({})[0] == {"echo": {}}
        for channel in greedy[:2]:
            with pytest.raises(BusyError, match="gives this connection's place away"):
                channel.request({})
        for channel in greedy[2:]:
            assert channel.request({})[0] == {"echo": {}}
        # A place that becomes free is found by the client itself.
        closing = threading.Timer(0.3, greedy[2].close)
        closing.start()
        connect(enclave, owner, policy).close()
        closing.join()


@pytest.mark.parametrize("told", [[BusyError], []])
def test_who_was_told_that_it_is_busy_is_not_told_that_it_is_slow(
    told: list[type[Exception]], owner: Identity, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time ends in the middle of an attempt: what counts is what the enclave has said before."""

    def attempt(*arguments: Any) -> None:
        if told:
            raise told.pop()("all connections are taken")
        time.sleep(max(arguments[4] - time.monotonic(), 0))
        raise ConnectionClosedError("peer is too slow")

    expected = BusyError if told else ConnectionClosedError
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "_connect", attempt)
    with pytest.raises(expected) as caught:
        connect_attested("tls://127.0.0.1:1", identity=owner, policy=policy, timeout=0.3)
    assert type(caught.value) is expected


def test_an_idle_connection_is_told_that_it_has_lost_its_place(
    start: Callable[..., Enclave], owner: Identity, other: Identity, policy: Policy
) -> None:
    enclave = start(max_connections=2, allow=lambda client: True)
    with bare_client(enclave.address) as first, bare_client(enclave.address) as second:
        authenticated(first, owner)
        authenticated(second, owner)
        with connect(enclave, other, policy):
            reply, _ = first.receive(ANY, deadline=soon())
            assert (reply["error"], reply["id"]) == ("busy", 1)
            second.send({"fields": {}, "id": 1}, limits=ANY, deadline=soon())
            assert second.receive(ANY, deadline=soon())[0] == {"fields": {"echo": {}}, "id": 1}


def test_a_request_that_trickles_is_left(
    start: Callable[..., Enclave], owner: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "MESSAGE_SECONDS", 0.2)
    enclave = start()
    with bare_client(enclave.address) as stream:
        authenticated(stream, owner)
        secured: Any = stream._socket
        secured.sendall((8).to_bytes(4, "little"))  # and then nothing
        with pytest.raises(ConnectionClosedError):
            stream.receive(ANY, deadline=soon())


def test_a_partys_requests_wait_for_one_another(
    start: Callable[..., Enclave], owner: Identity, other: Identity, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those beyond the bound wait, with their long payloads unread; another party's do not."""
    monkeypatch.setattr(server, "MAX_AT_ONCE", 2)
    monkeypatch.setattr(server, "MAX_PIECES", 3)
    release, inside = threading.Event(), threading.Semaphore(0)

    def handle(client: Any, fields: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        if client == owner.public:
            inside.release()
            release.wait(20)
        return {"size": len(payload)}, b""

    enclave = start(handle, allow=lambda client: True)
    replies: list[Any] = []
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(connect(enclave, owner, policy)) for _ in range(5)]
        piece = bytes(frames.LONG_BYTES + 1)
        threads = [
            threading.Thread(target=lambda c=channel: replies.append(c.request({}, piece)[0])) for channel in channels
        ]
        for thread in threads:
            thread.start()
        assert inside.acquire(timeout=20) and inside.acquire(timeout=20)
        with connect(enclave, other, policy) as channel:
            assert channel.request({}, piece)[0] == {"size": len(piece)}
        assert not inside.acquire(blocking=False)
        release.set()
        for thread in threads:
            thread.join(20)
    assert replies == [{"size": len(piece)}] * 5


@pytest.mark.slow
def test_200_silent_and_200_honest_connections(
    start: Callable[..., Enclave], owner: Identity, other: Identity, policy: Policy
) -> None:
    """All at once, from one address: nobody is cut, and requests are answered within 2 s at the 95th percentile.

    Half of the silent ones have said hello, the costliest that a stranger can do.
    """
    honest, seconds, faults = 200, [], []
    everybody = threading.Barrier(honest)
    enclave = start(allow=lambda client: client in (owner.public, other.public))

    def ask(identity: Identity) -> None:
        try:
            with connect(enclave, identity, policy, timeout=120) as channel:
                everybody.wait(120)
                for number in range(5):
                    begun = time.monotonic()
                    assert channel.request({"n": number}, os.urandom(1000))[0] == {"echo": {"n": number}}
                    seconds.append(time.monotonic() - begun)
                everybody.wait(120)
        except Exception as error:
            faults.append(error)
            everybody.abort()

    with contextlib.ExitStack() as stack:
        silent(enclave, 100, stack)
        for _ in range(100):
            greet(stack.enter_context(bare_client(enclave.address)))
        threads = [threading.Thread(target=ask, args=([owner, other][n % 2],)) for n in range(honest)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
        assert faults == []
        begun = time.monotonic()
        fetch_evidence(enclave.address)
        assert time.monotonic() - begun < 2
    seconds.sort()
    assert len(seconds) == honest * 5
    assert seconds[int(len(seconds) * 0.95)] < 2, (
        f"median {seconds[len(seconds) // 2]:.3f} s, longest {seconds[-1]:.3f} s"
    )
