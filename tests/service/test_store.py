"""The store: uploads in parts, with limits before the first byte and a check of all of it at the end."""

import os
import random
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.errors import FormatError, ObfuscatuneError, ProtocolError, SealError, StorageError, UsageError
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.sealed.header import read_header
from obfuscatune.parties.sealed.writer import SealedWriter
from obfuscatune.service import store as store_module
from obfuscatune.service import upload as upload_module
from obfuscatune.service.store import Store

SENDER = Identity.generate("clinic", "x25519")
PAYLOAD = b"a plain byte " * 1000
PARTY, SECOND = SENDER.public.fingerprint, "2" * 64
BAD_DIGESTS = [
    "",
    "../" * 21 + "a",
    "a" * 63,
    "a" * 65,
    "A" * 64,
    "a" * 64 + "\n",
    "/" * 64,
    "é" * 64,
    None,
    7,
    b"a" * 64,
]


def seal(path: Path, payload: bytes = PAYLOAD, kind: str = "data") -> str:
    with SealedWriter(
        path,
        kind=kind,  # type: ignore[arg-type]
        sender=SENDER,
        recipients=[SENDER.public],
        payload_bytes=len(payload),
        chunk_bytes=4096,
    ) as writer:
        writer.write(payload)
    return writer.digest


class Sealed(NamedTuple):
    data: bytes
    digest: str


def sealed_file(payload: bytes = PAYLOAD) -> Sealed:
    with tempfile.TemporaryDirectory() as name:
        digest = seal(Path(name) / "file", payload)
        return Sealed((Path(name) / "file").read_bytes(), digest)


FILE, OTHER = sealed_file(), sealed_file(b"other")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", 1 << 20)


def names(store: Store) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir() if path.name != "own")


def upload(store: Store, file: Sealed, data: bytes | None = None) -> Path:
    data = file.data if data is None else data
    part = store.begin(file.digest, len(data), PARTY)
    part.write(part.offset, data[part.offset :])
    return part.finish()


def test_who_shares_it_is_asked_without_its_lock(tmp_path: Path) -> None:
    """The answer may need the state's lock, and whoever holds that one may be waiting for the store's."""

    def parties() -> list[str]:
        thread = threading.Thread(target=lambda: store.charge("ab" * 32, PARTY), daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
        return [PARTY, SECOND]

    store = Store(tmp_path / "store", 1 << 20, parties)
    upload = store.begin("cd" * 32, 1000, PARTY)
    upload.write(0, bytes(10))
    assert store.room(PARTY) < 1 << 20


def test_a_file_comes_in_and_goes(store: Store) -> None:
    assert not store.has(FILE.digest)
    path = upload(store, FILE)
    assert path == store.path(FILE.digest) and path.read_bytes() == FILE.data and store.has(FILE.digest)
    assert path.stat().st_mode & 0o777 == 0o600 and store.directory.stat().st_mode & 0o777 == 0o700
    with pytest.raises(UsageError, match="already"):
        store.begin(FILE.digest, len(FILE.data), PARTY)
    store.remove(FILE.digest)
    store.remove(FILE.digest)
    assert names(store) == []
    with pytest.raises(UsageError, match="no such file"):
        store.path(FILE.digest)


def test_an_upload_goes_on_where_it_was(store: Store) -> None:
    part = store.begin(FILE.digest, len(FILE.data), PARTY)
    part.write(0, FILE.data[:5000])
    again = store.begin(FILE.digest, len(FILE.data), PARTY)
    assert again is part and again.offset == 5000
    store = Store(store.directory, store.max_bytes)  # after a restart too
    assert store.begin(FILE.digest, len(FILE.data), PARTY).offset == 5000
    assert upload(store, FILE).read_bytes() == FILE.data


def test_parts_in_a_wrong_place_are_refused(store: Store) -> None:
    part = store.begin(FILE.digest, len(FILE.data), PARTY)
    part.write(0, FILE.data[:100])
    for offset in (0, 99, 101, -1):
        with pytest.raises(ProtocolError, match="offset"):
            part.write(offset, b"x")
    with pytest.raises(ProtocolError, match="longer"):
        part.write(100, FILE.data[100:] + b"x")
    with pytest.raises(ProtocolError, match="not whole"):
        part.finish()
    part.write(100, FILE.data[100:])
    assert part.finish().read_bytes() == FILE.data
    for ended in (lambda: part.write(part.offset, b""), part.finish):
        with pytest.raises(ProtocolError, match="ended"):
            ended()


def test_another_file_than_announced_is_not_kept(store: Store) -> None:
    with pytest.raises(SealError, match="another file"):
        upload(store, FILE, OTHER.data)
    assert names(store) == []
    assert upload(store, FILE).read_bytes() == FILE.data


def test_what_is_no_sealed_file_is_not_kept(store: Store) -> None:
    with pytest.raises(FormatError):
        upload(store, FILE, b"plain text")
    assert names(store) == []


def test_corruptions_anywhere_are_refused(store: Store) -> None:
    generator = random.Random(5)
    for _ in range(300):
        data = bytearray(FILE.data)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        with pytest.raises(FormatError):
            upload(store, FILE, bytes(data))
        assert names(store) == []


def test_only_what_has_come_takes_room(tmp_path: Path) -> None:
    store = Store(tmp_path, 2 * len(FILE.data))
    upload(store, FILE)
    for digest in "1", "2", "3":  # announced: nothing is taken
        store.begin(digest * 64, len(FILE.data), PARTY)
    first, second = (store.begin(digest * 64, len(FILE.data), PARTY) for digest in "12")
    first.write(0, bytes(len(FILE.data) - 10))
    second.write(0, bytes(10))
    with pytest.raises(UsageError, match="no room in the store: got 1 bytes, expected at most 0"):
        second.write(10, bytes(1))
    with pytest.raises(UsageError, match="no room"):
        store.begin("4" * 64, 1, PARTY)
    first.abort()
    second.write(10, bytes(1))
    store = Store(tmp_path, 2 * len(FILE.data))  # a restart counts the same
    assert store.room(PARTY) == len(FILE.data) - 11


def test_each_party_has_a_share_that_the_others_cannot_take(tmp_path: Path) -> None:
    size = len(FILE.data)
    third = "3" * 64
    store = Store(tmp_path, 6 * size, lambda: [PARTY, SECOND, third])  # a sixth is kept for each
    greedy = [store.begin(f"{n}" * 64, size, PARTY) for n in range(5)]
    for part in greedy[:4]:
        part.write(0, bytes(size))
    with pytest.raises(UsageError, match="no room in the store"):
        greedy[4].write(0, bytes(1))
    assert (store.room(PARTY), store.room(SECOND), store.room(third), store.room("4" * 64)) == (0, size, size, 0)
    for party in SECOND, third:
        part = store.begin(FILE.digest if party == third else OTHER.digest, 100, party)
        part.write(0, bytes(100))
    assert store.room(SECOND) == size - 100


def test_nobody_spoils_or_ends_anothers_upload(store: Store) -> None:
    store.begin(FILE.digest, 10, SECOND).write(0, b"0123456789")
    mine = store.begin(FILE.digest, len(FILE.data), PARTY)
    assert mine.offset == 0
    mine.write(0, FILE.data)
    with pytest.raises(FormatError):
        store.begin(FILE.digest, 10, SECOND).finish()
    assert mine.finish().read_bytes() == FILE.data
    assert names(store) == [f"{FILE.digest}.sealed"]


def test_an_upload_that_is_being_verified_keeps_no_other_waiting(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifying takes minutes for a large file: the party's own announcement of another size waits, nobody else's."""
    inside, release = threading.Event(), threading.Event()
    real = upload_module.read_header

    def slow(path: Path) -> object:
        inside.set()
        assert release.wait(20)
        return real(path)

    part = store.begin(FILE.digest, len(FILE.data), PARTY)
    part.write(0, FILE.data)
    monkeypatch.setattr(upload_module, "read_header", slow)
    threads = [threading.Thread(target=part.finish)]
    threads[0].start()
    assert inside.wait(20)
    threads.append(threading.Thread(target=part.abort))
    threads[1].start()
    store.begin(OTHER.digest, len(OTHER.data), SECOND).write(0, OTHER.data)
    release.set()
    for thread in threads:
        thread.join(20)
    assert store.has(FILE.digest)


def test_a_disk_that_is_too_small_refuses_before_the_first_byte(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk(free: int) -> None:
        monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))

    disk((64 << 20) + 1000)
    part = store.begin("1" * 64, 1000, PARTY)
    part.write(0, b"x" * 500)
    disk((64 << 20) + 499)
    for full in (lambda: part.write(500, b"x" * 500), lambda: store.begin("2" * 64, 500, PARTY)):
        with pytest.raises(StorageError, match="no room on the disk"):
            full()
    disk((64 << 20) - 1)
    with pytest.raises(StorageError, match="no room on the disk"):
        store.put("output", lambda path: seal(path, kind="output"))
    assert names(store) == [f"{'1' * 64}.1000.{PARTY}.part"]
    disk(1 << 30)
    part.write(500, b"x" * 500)


@pytest.mark.parametrize("size", [0, -1, 1 << 70, True, 1.0, "5", None])
def test_a_size_is_a_number_of_bytes(store: Store, size: object) -> None:
    with pytest.raises(UsageError):
        store.begin(FILE.digest, size, PARTY)  # type: ignore[arg-type]
    assert names(store) == []


@pytest.mark.parametrize("digest", BAD_DIGESTS)
def test_a_digest_is_no_path(store: Store, digest: object) -> None:
    for use in (store.has, store.path, store.remove, lambda digest: store.begin(digest, 1, PARTY)):
        with pytest.raises(FormatError, match="digest"):
            use(digest)  # type: ignore[arg-type]
    assert names(store) == []


def test_a_start_removes_what_was_abandoned_and_what_the_enclave_had_not_finished(store: Store) -> None:
    store.begin(FILE.digest, 10, PARTY).write(0, b"x")
    old = store.begin(OTHER.digest, 20, PARTY)
    (store.directory / "own" / "half").write_bytes(b"x")
    (store.directory / "somebody's file").write_bytes(b"x")
    path = store.directory / f"{OTHER.digest}.20.{PARTY}.part"
    os.utime(path, (1, 1))
    store.begin("1" * 64, 1, PARTY)
    assert not path.exists() and old.ended  # an upload that nobody goes on with gives its room back, too
    os.utime(store.directory / f"{FILE.digest}.10.{PARTY}.part", (1, 1))
    store = Store(store.directory, store.max_bytes)
    assert names(store) == [f"{'1' * 64}.1.{PARTY}.part", "somebody's file"]
    assert list((store.directory / "own").iterdir()) == []


def test_a_part_that_grew_on_the_disk_begins_anew(store: Store) -> None:
    (store.directory / f"{FILE.digest}.{len(FILE.data)}.{PARTY}.part").write_bytes(bytes(len(FILE.data) + 1))
    assert upload(store, FILE).read_bytes() == FILE.data


def test_a_write_that_failed_can_be_made_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    part = store.begin(FILE.digest, len(FILE.data), PARTY)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", _half_full)
        with pytest.raises(ObfuscatuneError, match="cannot store a part"):
            part.write(0, FILE.data)
    assert part.offset == 0
    part.write(0, FILE.data)
    assert part.finish().read_bytes() == FILE.data


def _half_full(path: Path, *_: object, **__: object) -> None:
    path.write_bytes(b"torn")
    raise OSError(28, "No space left on device")


def test_what_the_enclave_makes_goes_by_its_digest(store: Store) -> None:
    digest = store.put("output", lambda path: seal(path, kind="output"))
    assert read_header(store.path(digest)).digest == digest
    assert names(store) == [f"{digest}.sealed"] and list((store.directory / "own").iterdir()) == []


def test_what_the_enclave_fails_to_make_leaves_nothing(store: Store) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put("output", fail)
    with pytest.raises(SealError, match="another kind"):
        store.put("output", lambda path: seal(path, kind="adapter"))
    with pytest.raises(FormatError):
        store.put("output", lambda path: str(path.write_bytes(b"not sealed at all")))
    assert names(store) == [] and list((store.directory / "own").iterdir()) == []


def test_a_file_exchanged_on_the_disk_while_it_is_taken_in_is_refused(store: Store) -> None:
    """Anybody can seal a checkpoint to the enclave, with keys of their own; it must not get into the book."""

    def exchanged(path: Path) -> str:
        digest = seal(path, kind="checkpoint")
        seal(path, b"with other keys", kind="checkpoint")
        return digest

    with pytest.raises(SealError, match="exchanged"):
        store.put("checkpoint", exchanged)
    assert names(store) == [] and list((store.directory / "own").iterdir()) == []


def test_an_upload_follows_no_link(store: Store, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"before")
    (store.directory / f"{FILE.digest}.{len(FILE.data)}.{PARTY}.part").symlink_to(elsewhere)
    with pytest.raises(ObfuscatuneError, match="upload"):
        upload(store, FILE)
    assert elsewhere.read_bytes() == b"before"


def test_a_full_store_takes_the_enclaves_own_files(tmp_path: Path) -> None:
    store = Store(tmp_path, len(FILE.data))
    upload(store, FILE)
    assert store.has(store.put("checkpoint", lambda path: seal(path, kind="checkpoint")))
    with pytest.raises(UsageError, match="no room"):
        store.begin("1" * 64, 1, PARTY)


def test_many_upload_at_once(store: Store) -> None:
    files, faults = [sealed_file(bytes([number]) * 5000) for number in range(6)], []

    def work(file: Sealed) -> None:
        try:
            part = store.begin(file.digest, len(file.data), PARTY)
            while part.offset < part.size:
                part.write(part.offset, file.data[part.offset : part.offset + 999])
            part.finish()
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and all(store.path(file.digest).read_bytes() == file.data for file in files)


steps = st.tuples(
    st.sampled_from(["begin", "write", "finish", "abort", "restart", "remove"]),
    st.sampled_from([FILE, OTHER]),
    st.integers(-2, 2),
    st.integers(0, 20_000),
)


@settings(max_examples=150)
@given(st.lists(steps, max_size=20))
def test_whatever_the_order_only_whole_files_are_in_the_store(
    sequence: list[tuple[str, Sealed, int, int]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        store, parts = Store(Path(name), 60_000), {}
        for what, file, shift, count in sequence:
            part = parts.get(file.digest)
            try:
                if what == "begin":
                    parts[file.digest] = store.begin(file.digest, len(file.data) + min(shift, 0), PARTY)
                elif what == "restart":
                    store, parts = Store(Path(name), 60_000), {}
                elif what == "remove":
                    store.remove(file.digest)
                elif part is not None and what == "write":
                    at = part.offset
                    part.write(at + (shift if count % 7 == 0 else 0), file.data[at : at + count])
                elif part is not None:
                    getattr(part, what)()
            except (ProtocolError, UsageError):
                pass
            for known in (FILE, OTHER):
                assert not store.has(known.digest) or store.path(known.digest).read_bytes() == known.data
            assert all(path.suffix in (".part", ".sealed", "") for path in store.directory.iterdir())
