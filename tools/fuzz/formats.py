"""Targets of files and messages: canonical JSON, identities, sealed files and payloads, jobs, frames, state, log."""

import base64
import json
import struct
import warnings
from pathlib import Path
from typing import Any

from target import Target

from obfuscatune.parties.canonical import decode, encode
from obfuscatune.parties.identity import Identity, PublicIdentity


def _identities() -> tuple[Identity, Identity, Identity]:
    provider, owner, enclave = (Identity.generate(name, "x25519") for name in ("provider", "owner", "enclave"))
    return provider, owner, enclave


def canonical(scratch: Path) -> Target:
    """Canonical JSON, under every other format."""
    seeds = (b"{}", encode({"a": [1, -2.5, None, True, "\u00e9\n"], "b": {"c": {}}, "d": 2**64 - 1}))
    return Target(lambda data: decode(data, "input"), seeds)


def identity(scratch: Path) -> Target:
    """A public identity."""
    seeds = tuple(
        encode(Identity.generate("clinic", suite).public.to_dict()) for suite in ("x25519", "mlkem768-x25519")
    )
    return Target(lambda data: PublicIdentity.from_dict(decode(data, "identity")), seeds)


def sealed_file(scratch: Path) -> Target:
    """A whole sealed file, opened by its recipient, every byte read."""
    from obfuscatune.parties.sealed import SealedArchive, SealedReader, seal_files

    provider, _, enclave = _identities()
    path = scratch / "sealed"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        with SealedReader(path, enclave) as reader:
            archive = SealedArchive(reader)
            for name in archive.names():
                archive.read(name, 1 << 20)

    seal_files(path, {"a": b"x" * 70_000, "b/c": b""}, kind="data", sender=provider, recipients=[enclave.public])
    return Target(parse, (path.read_bytes(),), strict=True)


def sealed_header(scratch: Path) -> Target:
    """The header record of a sealed file, whose signature its own sender makes: any sender may make any header."""
    from obfuscatune.parties.sealed import seal_files
    from obfuscatune.parties.sealed.fields import PREFIX, Header

    provider, owner, enclave = _identities()
    path = scratch / "sealed"
    recipients = [owner.public, enclave.public]
    seal_files(path, {"a": b"x"}, kind="model", sender=provider, recipients=recipients, terms={"max_queries": 3})
    data = path.read_bytes()
    length = PREFIX.unpack(data[: PREFIX.size])[-1]
    return Target(lambda data: Header.from_bytes(data, "header"), (data[PREFIX.size : PREFIX.size + length],))


class _Payload:
    """Plain bytes in the place of a sealed file's payload: the sender of a file chooses every one of them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.payload_bytes = data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        part = self.data[offset : offset + length]
        if offset < 0 or len(part) != length:
            raise AssertionError("read beyond the payload")
        return part

    def read_into(self, offset: int, buffer: Any) -> None:
        buffer[:] = self.read(offset, len(buffer))


def archive(scratch: Path) -> Target:
    """The payload of a sealed file: table of contents, safetensors headers, index of shards, tensors."""
    import torch
    from safetensors.torch import save

    from obfuscatune.parties.sealed.archive import SealedArchive
    from obfuscatune.parties.sealed.contents import encode_contents
    from obfuscatune.parties.sealed.tensors import SealedTensors

    def parse(data: bytes) -> None:
        tensors = SealedTensors(SealedArchive(_Payload(data)))  # type: ignore[arg-type]
        for name in tensors.names():
            tensors.get(name)

    def payload(files: dict[str, bytes]) -> bytes:
        return encode_contents({name: len(file) for name, file in files.items()}) + b"".join(files.values())

    one = save({"w": torch.ones(2, 3), "flag": torch.tensor([True, False])})
    two = save({"v": torch.zeros(0, 4, dtype=torch.bfloat16)})
    index = {"metadata": {}, "weight_map": {"w": "a.safetensors", "flag": "a.safetensors", "v": "b.safetensors"}}
    shards = {"a.safetensors": one, "b.safetensors": two, "model.safetensors.index.json": json.dumps(index).encode()}
    return Target(parse, (payload({"model.safetensors": one}), payload(shards)))


def tensor_header(scratch: Path) -> Target:
    """The header of a safetensors file alone, in an archive that fits around it."""
    import torch
    from safetensors.torch import save

    from obfuscatune.parties.sealed.archive import SealedArchive
    from obfuscatune.parties.sealed.contents import encode_contents
    from obfuscatune.parties.sealed.tensors import SealedTensors

    def parse(data: bytes) -> None:
        file = struct.pack("<Q", len(data)) + data + bytes(64)
        tensors = SealedTensors(SealedArchive(_Payload(encode_contents({"model.safetensors": len(file)}) + file)))  # type: ignore[arg-type]
        for name in tensors.names():
            tensors.get(name)

    saved = save({"w": torch.ones(2, 4), "v": torch.zeros(8)})
    (length,) = struct.unpack("<Q", saved[:8])
    return Target(parse, (saved[8 : 8 + length],))


def job(scratch: Path) -> Target:
    """A job with two signatures."""
    from obfuscatune.parties.job import Job, SignedJob

    provider, owner, enclave = _identities()
    prints = {"provider": provider, "owner": owner, "enclave": enclave}
    names = {role: who.public.fingerprint for role, who in prints.items()}
    made = Job(
        **names, model="1" * 64, data="2" * 64, adapter_to=("owner",), queries_by=("owner",), created=1, expires=2**33
    )
    signed = SignedJob(made).sign(provider).sign(owner)
    return Target(SignedJob.from_bytes, (signed.to_bytes(), SignedJob(made).to_bytes()))


def terms(scratch: Path) -> Target:
    """An owner's terms, as a sealed header carries them."""
    from obfuscatune.parties.exposure import line
    from obfuscatune.parties.terms import Terms
    from obfuscatune.parties.vocabulary import Worker, profile_named

    given = Terms(
        profiles=("enclave", "shared", "balanced"),
        partners=("0" * 64,),
        max_queries=5,
        expires=2**33,
        workers=(Worker("0" * 64, "a cloud"),),
        shows={"balanced": line(profile_named("balanced"))},
    )
    seeds = (encode(given.to_dict()), b'{"version":3}', b'{"version":3,"workers":"any"}')
    return Target(lambda data: Terms.from_dict(decode(data, "terms")), seeds, refused=(b"{}", b'{"version":2}'))


def succession(scratch: Path) -> Target:
    """The end of an identity, by its own word."""
    from obfuscatune.parties.succession import read_succession, succeed

    provider, owner, _ = _identities()
    seeds = (succeed(provider, owner, now=5), succeed(provider, None, now=5))
    return Target(lambda data: read_succession(data), seeds, strict=True)


def membership(scratch: Path) -> Target:
    """A chain of two memberships, of which the second line is the input: signed by both members."""
    from obfuscatune.parties.change import Member, SignedChange
    from obfuscatune.parties.membership import follow, found, founded

    provider, owner, enclave = _identities()
    first = found("ee" * 32, [Member(provider.public), Member(owner.public)], now=5)
    signed = SignedChange(founded(first, "ee" * 32).next("admit", Member(enclave.public))).sign(provider).sign(owner)
    line = first.to_bytes()
    return Target(lambda data: follow([line, data], "ee" * 32), (signed.to_bytes(),), strict=True)


def upgrade(scratch: Path) -> Target:
    """A statement of which code may take over, before its signatures are looked at."""
    from obfuscatune.parties.upgrade import Upgrade

    provider, owner, _ = _identities()
    signed = Upgrade("ee" * 32, "kinds = 1", {"root.pem": b"x"}, 1, 2).sign(provider).sign(owner)
    return Target(lambda data: Upgrade.from_bytes(data), (signed.to_bytes(),))


def hand_over(scratch: Path) -> Target:
    """What an enclave hands over to another."""
    from obfuscatune.service.handover import open_bundle, seal_bundle

    old, _, new = _identities()
    fields = {"former": [], "jobs": {}, "log_head": "0" * 64, "log_length": 0, "members": []}
    bundle = seal_bundle(fields, old, new.public, "ab" * 32)
    return Target(lambda data: open_bundle(data, new), (bundle,), strict=True)


def escrow(scratch: Path) -> Target:
    """The state that an enclave has left on the disk for its parties to release, with the shares of all."""
    from obfuscatune.parties.change import Member
    from obfuscatune.parties.membership import found
    from obfuscatune.service.escrow import FILE, Escrow, Recovery

    provider, _, enclave = _identities()

    class Kept:
        """As much of a state as is kept."""

        identity, former, handed = enclave, (), ""
        former_identities: tuple[Identity, ...] = ()
        members = (found(enclave.public.fingerprint, [Member(provider.public)], now=5).to_bytes().decode(),)

        def fields(self) -> dict[str, Any]:
            identity = base64.b64encode(enclave.to_bytes()).decode()
            kept = {"identity": identity, "jobs": {}, "log_head": "0" * 64, "log_length": 0}
            return {**kept, "former": [], "members": list(self.members)}

    Escrow(Kept(), scratch).write()  # type: ignore[arg-type]
    seed = (scratch / FILE).read_bytes()

    def parse(data: bytes) -> None:
        (scratch / FILE).write_bytes(data)
        recovery = Recovery(scratch, enclave)
        recovery.share(provider.public)
        recovery.release(provider.public, bytes(32))

    return Target(parse, (), refused=(seed,))


def certificate_of_hand_over(scratch: Path) -> Target:
    """The certificate by which one enclave goes on for another."""
    from obfuscatune.parties.upgrade import certify, read_certificate

    old, _, new = _identities()
    return Target(lambda data: read_certificate(data), (certify(old, new.public, "ab" * 32),), strict=True)


def card(scratch: Path) -> Target:
    """The card of a sealed file, from a partner."""
    from obfuscatune.parties.sealed import seal_files
    from obfuscatune.parties.sealed.card import make_card, read_card

    provider, _, enclave = _identities()
    path = scratch / "sealed"
    seal_files(path, {"a": b"x"}, kind="data", sender=provider, recipients=[enclave.public], chunk_bytes=4096)
    seed, file = make_card(path), scratch / "card"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        read_card(file)

    return Target(parse, (seed, seed + b"\n"))


def _message(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Read one message of the attested channel, in the state that allows most."""
    from obfuscatune.errors import ConnectionClosedError
    from obfuscatune.parties.channel.frames import SESSION, read_message

    rest = memoryview(data)

    def read(size: int) -> bytes:
        nonlocal rest
        if size > SESSION.payload:
            raise AssertionError("asked for more than the limits")
        if size > len(rest):
            raise ConnectionClosedError("connection is closed")
        part, rest = rest[:size], rest[size:]
        return bytes(part)

    return read_message(read, SESSION)


def _sent(fields: dict[str, Any], payload: bytes) -> bytes:
    from obfuscatune.parties.channel.frames import SESSION, encode_message

    return encode_message(fields, payload, SESSION) + payload


def channel_frame(scratch: Path) -> Target:
    """One message of the attested channel."""
    fields = {"verb": "upload", "offset": 0, "size": 4, "list": [1, {"a": None}]}
    return Target(_message, (_sent(fields, b"data"), _sent({}, b"")))


def query(scratch: Path) -> Target:
    """What a query asks for, and how it is to be sampled."""
    from obfuscatune.service.queries import Query, read_prompts, read_settings

    def parse(data: bytes) -> str:
        fields, payload = _message(data)
        return Query("ab" * 32, "cd" * 32, read_prompts(payload), read_settings(fields)).question

    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": -7, "stop": ["\u00e9", "x"]}
    messages = [{"role": "user", "content": "why?"}]
    seeds = (
        _sent({"max_new_tokens": 5}, b'["a", "b"]'),
        _sent({"max_new_tokens": 5, "sampling": sampling}, json.dumps(["a", messages]).encode()),
    )
    return Target(parse, seeds)


def answer(scratch: Path) -> Target:
    """An enclave's last part of an answer, as a client takes it after another one."""
    from obfuscatune.serving.question import Question
    from obfuscatune.serving.sampling import Settings

    def parse(data: bytes) -> None:
        Question("why?", Settings(longest=9), None).take(iter([({"tokens": 1}, b"a"), _message(data)]))

    counts = {"prompt_tokens": [3], "completion_tokens": [2], "ended": [1]}
    return Target(parse, (_sent(counts, b""), _sent(counts, "\u00e9".encode())))


def protocol_frame(scratch: Path) -> Target:
    """One frame between enclave and worker."""
    import torch

    from obfuscatune.protocol.frames import TensorSpec, decode_frame, encode_head

    specs = [TensorSpec("x", torch.float32, (2, 3)), TensorSpec("mask", torch.bool, (2,))]
    fields = {"op": "forward", "id": 7, "options": {"scale": 0.5, "names": ["a", "b"]}}
    seeds = tuple(head + bytes(size) for head, size in (encode_head(fields, specs), encode_head({}, [])))
    return Target(decode_frame, seeds)


def drawn_tensors(scratch: Path) -> Target:
    """A frame whose tensors the worker makes of seeds."""
    from obfuscatune.protocol.expand import drawn, tensors_drawn
    from obfuscatune.protocol.frames import decode_frame, encode_head

    field = {"x": drawn(bytes(range(32)), (251, 83), (3, 4)), "weight": drawn(bytes(32), (241,), (1, 1))}
    head, _ = encode_head({"op": "multiply", "id": 7, "drawn": field}, [])

    def parse(data: bytes) -> None:
        fields, _ = decode_frame(data)
        tensors_drawn(fields.get("drawn"), 1 << 16)

    return Target(parse, (head,))


def state(scratch: Path) -> Target:
    """The enclave's state on the operator's disk."""
    from types import SimpleNamespace

    from obfuscatune.service.state import State

    platform: Any = SimpleNamespace(sealing_key=lambda: b"k" * 32, counter=None)
    path = scratch / "state.sealed"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        path.chmod(0o600)
        State.open(scratch, platform).close()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        State.open(scratch, platform).close()
    return Target(parse, (path.read_bytes(),), strict=True)


def log_copy(scratch: Path) -> Target:
    """A party's copy of the audit log."""
    from obfuscatune.service.log import AuditLog, check, join_copy, split_copy

    _, _, enclave = _identities()
    log = AuditLog.open(scratch / "log", "0" * 64, 0)
    for event in ("start", "job-taken", "stop"):
        log.append(event, job="1" * 64, party="2" * 64, bytes=7, profile="balanced")
    seed = join_copy(log.lines(0), log.signed_head(enclave))
    log.close()

    def parse(data: bytes) -> None:
        lines, head = split_copy(data)
        check(lines, head, enclave.public)

    return Target(parse, (seed,), strict=True)


def log_entry(scratch: Path) -> Target:
    """One line of the audit log, which follows any other."""
    from obfuscatune.service.entries import Entry

    entry = Entry(3, 1_700_000_000, "job-taken", "1" * 64, None, {"profile": "balanced", "bytes": 7}, "0" * 64)
    return Target(Entry.from_bytes, (entry.to_bytes(),))
