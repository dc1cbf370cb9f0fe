"""Keys at rest: a locked identity opens by its passphrase alone, from a terminal or from a file of a secret manager."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from obfuscatune.cli import main
from obfuscatune.errors import FormatError, SealError, UsageError
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.passphrase import VARIABLE, lock, new_passphrase, unlock

PASSPHRASE = "correct horse battery"
ALICE = Identity.generate("alice", "x25519")


@pytest.fixture
def passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the passphrase, as a secret manager leaves it."""
    path = tmp_path / "passphrase"
    path.write_text(f"{PASSPHRASE}\n")
    path.chmod(0o600)
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def locked(**changes: Any) -> dict[str, Any]:
    return {**json.loads(lock(ALICE.to_bytes(), ALICE.public.to_dict(), PASSPHRASE, log2_n=14)), **changes}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def test_it_opens_by_the_passphrase_alone() -> None:
    fields = locked()
    assert unlock(fields, PASSPHRASE, "key") == ALICE.to_bytes()
    secret = ALICE._secret
    for form in (secret, secret.hex().encode(), base64.b64encode(secret)):
        assert form not in encode(fields)
    with pytest.raises(SealError, match=r"another passphrase, or it was changed(.|\n)*enter it again"):
        unlock(fields, "another passphrase", "key")
    assert locked()["box"] != fields["box"]


@pytest.mark.parametrize(
    "changes",
    [
        {"log2_n": 15},
        {"public": Identity.generate("alice", "x25519").public.to_dict()},
        {"salt": base64.b64encode(bytes(16)).decode()},
        {"nonce": base64.b64encode(bytes(12)).decode()},
        {"box": base64.b64encode(bytes(200)).decode()},
    ],
)
def test_a_change_is_seen(changes: dict[str, Any]) -> None:
    with pytest.raises(SealError):
        unlock(locked(**changes), PASSPHRASE, "key")


@pytest.mark.parametrize(
    "changes",
    [{"log2_n": 40}, {"log2_n": 14.0}, {"log2_n": True}, {"salt": ""}, {"nonce": "AA=="}, {"box": 1}, {"more": 1}],
)
def test_a_form_that_is_none(changes: dict[str, Any]) -> None:
    """Work that would take the machine's memory, among others: refused before anything is allocated."""
    with pytest.raises(FormatError):
        unlock(locked(**changes), PASSPHRASE, "key")


def test_a_short_passphrase_is_refused() -> None:
    with pytest.raises(UsageError, match="too short"):
        ALICE.lock("password")


def test_the_file_is_read_by_every_user_of_the_key(tmp_path: Path, passphrase: Path) -> None:
    path = write(tmp_path / "alice.key", encode(locked()) + b"\n")
    assert Identity.load(path).public == ALICE.public
    passphrase.write_text("another passphrase")
    with pytest.raises(SealError) as caught:
        Identity.load(path)
    assert "another passphrase," in str(caught.value) and PASSPHRASE not in str(caught.value)
    passphrase.chmod(0o644)
    with pytest.raises(UsageError, match="passphrase file is readable by others"):
        Identity.load(path)


def test_without_a_terminal_and_a_file_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    with pytest.raises(UsageError, match=VARIABLE):
        Identity.load(write(tmp_path / "alice.key", encode(locked())))


def test_at_a_terminal_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda _: PASSPHRASE)
    assert Identity.load(write(tmp_path / "alice.key", encode(locked()))).public == ALICE.public


def test_the_verbs(tmp_path: Path, passphrase: Path) -> None:
    assert main(["identity", "new", "bob", "--output_dir", str(tmp_path), "--passphrase", "--suite", "x25519"]) == 0
    path = tmp_path / "bob.key"
    before = path.read_bytes()
    bob = Identity.load(path)
    assert path.stat().st_mode & 0o077 == 0 and bob._secret not in before
    assert main(["identity", "lock", str(path)]) == 0
    assert path.read_bytes() != before and Identity.load(path).public == bob.public
    assert path.stat().st_mode & 0o077 == 0


def test_no_open_key_stays_under_another_name(tmp_path: Path, passphrase: Path) -> None:
    key, link, name = tmp_path / "safe" / "alice.key", tmp_path / "link.key", tmp_path / "name.key"
    key.parent.mkdir()
    write(key, ALICE.to_bytes())
    link.symlink_to(key)
    name.hardlink_to(key)
    assert main(["identity", "lock", str(link)]) == 2 and key.read_bytes() == ALICE.to_bytes()
    name.unlink()
    assert main(["identity", "lock", str(link)]) == 0
    assert link.is_symlink()
    assert json.loads(key.read_bytes())["format"].endswith("locked") and Identity.load(link).public == ALICE.public


def test_a_new_one_is_asked_for_twice_where_the_variable_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable names no file: a passphrase that was mistyped once would lose the key."""
    typed = iter([PASSPHRASE, f"{PASSPHRASE} mistyped"])
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("getpass.getpass", lambda _: next(typed))
    with pytest.raises(UsageError, match="differ"):
        new_passphrase("alice.key")


def test_a_key_without_a_passphrase_yet_is_not_called_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    with pytest.raises(UsageError, match=r"no terminal to ask for the passphrase of alice\.key") as error:
        new_passphrase("alice.key")
    assert VARIABLE in str(error.value) and "is locked" not in str(error.value)
