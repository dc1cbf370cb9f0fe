"""The end of an identity: by its own word, with a successor who has agreed, or for good; nothing undoes it."""

import itertools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.cli import main
from obfuscatune.errors import ConsentError, FormatError, SealError, UsageError
from obfuscatune.parties import Party
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.succession import load_successions, read_succession, succeed
from obfuscatune.parties.terms import Terms
from obfuscatune.service.members import load_parties

OLD, NEW, THIEF = (Identity.generate(name, "x25519") for name in ("clinic", "clinic-2", "thief"))
STATEMENT = succeed(OLD, NEW)


def altered(**changes: Any) -> bytes:
    return encode({**json.loads(STATEMENT), **changes})


def put(directory: Path, *publics: Identity, **statements: bytes) -> Path:
    directory.mkdir(exist_ok=True)
    for identity in publics:
        (directory / f"{identity.public.name}.pub").write_bytes(encode(identity.public.to_dict()))
    for name, data in statements.items():
        (directory / f"{name}.succession").write_bytes(data)
    return directory


def test_both_sign_it() -> None:
    found = read_succession(STATEMENT)
    assert (found.identity, found.successor) == (OLD.public, NEW.public)
    assert read_succession(succeed(OLD, None)).successor is None
    ends, revoked = json.loads(STATEMENT), json.loads(succeed(OLD, None))
    for changed, error in (
        ({"time": ends["time"] + 1}, SealError),
        ({"successor": THIEF.public.to_dict()}, SealError),
        ({"identity": THIEF.public.to_dict()}, SealError),
        ({"successor_signature": ends["signature"]}, SealError),
        ({"signature": revoked["signature"]}, SealError),
        ({"successor": None}, FormatError),
        ({"successor": None, "successor_signature": None}, SealError),
        ({"successor_signature": None}, FormatError),
        ({"successor": OLD.public.to_dict()}, FormatError),
        ({"time": -1}, FormatError),
        ({"format": "obfuscatune succession 2"}, FormatError),
    ):
        with pytest.raises(error):
            read_succession(altered(**changed))


def test_an_enclave_lets_the_successor_in_and_the_old_one_no_more(tmp_path: Path) -> None:
    directory = put(tmp_path / "parties", OLD, THIEF)
    assert load_parties(directory) == [OLD.public, THIEF.public]
    put(directory, clinic=STATEMENT)
    assert load_parties(directory) == [NEW.public, THIEF.public]
    put(directory, second=succeed(NEW, None))
    assert load_parties(directory) == [THIEF.public]


def test_one_whose_time_is_to_come_is_an_expiry(tmp_path: Path) -> None:
    directory = put(tmp_path / "parties", OLD, later=succeed(OLD, None, now=time.time() + 1000))
    assert load_parties(directory) == [OLD.public]
    assert [each.identity for each in load_successions(directory, time.time() + 1001)] == [OLD.public]


@pytest.mark.parametrize("other", [succeed(OLD, THIEF), succeed(OLD, None)])
def test_of_two_statements_that_differ_nobody_succeeds(tmp_path: Path, other: bytes) -> None:
    for first, second in ((STATEMENT, other), (other, STATEMENT)):
        assert load_parties(put(tmp_path / "parties", OLD, a=first, b=second)) == []


def test_a_circle_of_successions_ends_both(tmp_path: Path) -> None:
    assert load_parties(put(tmp_path / "parties", OLD, a=STATEMENT, b=succeed(NEW, OLD))) == []


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Party, Party]:
    """A provider and an owner, who know each other."""
    made = {"enclave": "tls://127.0.0.1:1"}
    lab = Party.init("lab", role="provider", folder=tmp_path / "lab", **made)
    clinic = Party.init("clinic", role="owner", folder=tmp_path / "clinic", partner=tmp_path / "lab/lab.pub", **made)
    return lab.with_partner(tmp_path / "clinic/clinic.pub"), clinic


def test_a_party_rotates_and_its_partner_follows(folders: tuple[Party, Party]) -> None:
    lab, clinic = folders
    before = clinic.identity.public
    assert main(["party", "rotate", "clinic-2", "--party", str(clinic.folder)]) == 0
    after = Party.open(clinic.folder).identity.public
    assert after.name == "clinic-2" and after != before
    lab = lab.with_partner(clinic.folder / "clinic.succession")
    assert Party.open(lab.folder).partner == after
    assert Terms.from_dict(lab.terms).partners == (after.fingerprint,)
    with pytest.raises(ConsentError, match="has ended"):
        lab.with_partner(clinic.folder / "clinic.pub")
    assert lab.with_partner(clinic.folder / "clinic.succession").partner == after  # taken again, nothing changes
    (lab.folder / "other.succession").write_bytes(succeed(OLD, NEW))
    with pytest.raises(UsageError, match="not the end of your partner's identity"):
        lab.with_partner(lab.folder / "other.succession")


def test_who_was_robbed_can_still_end_what_a_thief_has_made(folders: tuple[Party, Party], tmp_path: Path) -> None:
    lab, clinic = folders
    stolen, revoked = tmp_path / "stolen.succession", tmp_path / "revoked.succession"
    stolen.write_bytes(succeed(clinic.identity, THIEF))
    lab = lab.with_partner(stolen)
    assert lab.partner == THIEF.public and Terms.from_dict(lab.terms).partners == (THIEF.public.fingerprint,)
    revoked.write_bytes(succeed(clinic.identity, None))
    lab = lab.with_partner(revoked)
    assert Party.open(lab.folder).partner_file is None and Terms.from_dict(lab.terms).partners == ()
    for statement in (stolen, revoked):  # nothing brings the thief back
        with pytest.raises(UsageError, match="no partner yet"):
            _ = lab.with_partner(statement).partner


def test_a_thief_who_goes_on_and_on_is_ended_too(folders: tuple[Party, Party], tmp_path: Path) -> None:
    lab, clinic = folders
    heirs = [clinic.identity, THIEF, Identity.generate("thief-2", "x25519"), NEW]  # the first of them robbed
    for one, other in itertools.pairwise(heirs):
        path = tmp_path / f"{other.public.name}.succession"
        path.write_bytes(succeed(one, other))
        lab = lab.with_partner(path)
        assert lab.partner == other.public and Terms.from_dict(lab.terms).partners == (other.public.fingerprint,)
    revoked = tmp_path / "revoked.succession"
    revoked.write_bytes(succeed(clinic.identity, None))
    by_hand = lab.folder / "by-hand.succession"
    by_hand.write_bytes(revoked.read_bytes())
    with pytest.raises(ConsentError, match="your partner's identity has ended"):
        _ = lab.partner
    by_hand.unlink()
    middle = tmp_path / "middle.succession"  # whoever of them disputes it
    middle.write_bytes(succeed(THIEF, None))
    for statements in ((revoked, middle), (middle, revoked)):
        party = Party.open(shutil.copytree(lab.folder, tmp_path / statements[0].stem))
        for statement in (*statements, tmp_path / "thief.succession"):
            party = party.with_partner(statement)
            assert Party.open(party.folder).partner_file is None and Terms.from_dict(party.terms).partners == ()
        with pytest.raises(ConsentError, match="in dispute"):  # nor by way of its file
            party.with_partner(lab.folder / "clinic-2.pub")
    unknown = tmp_path / "unknown.succession"
    unknown.write_bytes(succeed(Identity.generate("x", "x25519"), THIEF))
    with pytest.raises(UsageError, match="not the end of your partner's identity"):
        lab.with_partner(unknown)
    assert lab.with_partner(tmp_path / "thief.succession").partner == NEW.public  # the control: nothing is new


def test_a_successor_ends_on_the_day_of_whom_it_succeeds(folders: tuple[Party, Party], tmp_path: Path) -> None:
    lab, clinic = folders
    ends, heir = tmp_path / "ends.succession", tmp_path / "heir.succession"
    ends.write_bytes(succeed(clinic.identity, None, now=time.time() + 1000))
    heir.write_bytes(succeed(clinic.identity, NEW))
    lab = lab.with_partner(ends).with_partner(heir)
    assert lab.partner == NEW.public
    kept = next(path for path in lab.folder.glob("*.succession") if path.read_bytes() == ends.read_bytes())
    kept.write_bytes(succeed(clinic.identity, None))  # the day has come
    with pytest.raises(ConsentError, match="your partner's identity has ended"):
        _ = lab.partner


def test_a_statement_of_a_clock_ahead_is_taken_when_its_time_has_come(
    folders: tuple[Party, Party], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, clinic = folders
    ahead, before = tmp_path / "ahead.succession", clinic.identity.public
    ahead.write_bytes(succeed(clinic.identity, NEW, now=time.time() + 30))
    assert lab.with_partner(ahead).partner == before
    now = time.time() + 31
    monkeypatch.setattr(time, "time", lambda: now)
    assert lab.with_partner(ahead).partner == NEW.public


def test_a_partner_until_a_day(folders: tuple[Party, Party]) -> None:
    lab, clinic = folders
    key, statement = str(clinic.identity_file), clinic.folder / "clinic.succession"
    for day in ("soon", "1960-01-01", "2999-01-01T00:00+05:00"):  # days are of UTC
        assert main(["identity", "revoke", key, "--on", day]) == 2
    assert not statement.exists()
    assert main(["identity", "revoke", key, "--on", "2999-01-01"]) == 0
    assert lab.with_partner(statement).partner == clinic.identity.public
    kept = next(lab.folder.glob("*.succession"))
    kept.write_bytes(succeed(clinic.identity, None, now=time.time() - 1))  # the day has come
    with pytest.raises(ConsentError, match="your partner's identity has ended"):
        _ = Party.open(lab.folder).partner


def test_an_identity_that_was_revoked_is_nobodys_partner(folders: tuple[Party, Party]) -> None:
    lab, clinic = folders
    statement = clinic.folder / "clinic.succession"
    assert main(["identity", "revoke", str(clinic.identity_file), "--output", str(statement)]) == 0
    assert lab.with_partner(statement).partner_file is None
    with pytest.raises(UsageError, match="no partner yet"):
        _ = Party.open(lab.folder).partner
    with pytest.raises(ConsentError, match="has ended"):
        Party.open(lab.folder).with_partner(clinic.folder / "clinic.pub")
    renamed = clinic.folder / "renamed.pub"  # as who has stolen the key can
    renamed.write_bytes(encode(replace(clinic.identity.public, name="clinic-2").to_dict()))
    with pytest.raises(ConsentError, match="has ended"):
        Party.open(lab.folder).with_partner(renamed)
    other = clinic.folder / "other.pub"  # nor the successor of another partner
    other.write_bytes(encode(NEW.public.to_dict()))
    partner, heir = lab.with_partner(other), replace(clinic.identity, public=PublicIdentity.load(renamed))
    statement.write_bytes(succeed(NEW, heir, now=time.time() - 1))
    with pytest.raises(ConsentError, match="has ended, under another name: got clinic-2"):
        partner.with_partner(statement)
    assert Party.open(lab.folder).partner == NEW.public
    assert PublicIdentity.load(clinic.folder / "clinic.pub") == clinic.identity.public
