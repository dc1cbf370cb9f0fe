"""Whom a party's folder trusts: how it is made, its partner, the end of a partner's identity, workers, its own keys."""

import dataclasses
import hashlib
import os
import re
import time
from pathlib import Path
from typing import Self

from obfuscatune.durable import rename, sync, write_new
from obfuscatune.errors import ConsentError, FormatError, ObfuscatuneError, UsageError
from obfuscatune.parties.attestation.measurement import measure_code
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.channel.address import TlsAddress
from obfuscatune.parties.files import read_small
from obfuscatune.parties.folder import FILE, Folder
from obfuscatune.parties.identity import ENCLAVE, Identity, PublicIdentity
from obfuscatune.parties.membership import lineage, resolve
from obfuscatune.parties.succession import MAX_BYTES, SUFFIX, ancestry, load_successions, read_succession, succeed
from obfuscatune.parties.terms import Terms, load_terms, template
from obfuscatune.parties.vocabulary import ROLES, Role, Worker

_MAX_BYTES = 65_536
_ROOT = "simulation-root.pem"
_EVER = 1 << 49  # Unix seconds after all times of statements
_POLICY = """# Which enclaves you accept. Fill in the measurements of an image that you have built or read.
# docs/attestation.md has all keys.
[platform]
kinds = []            # some of "tdx", "snp", "sgx", "tpm", "nitro", "azure"
[measurements]
# mrtd = ["96 hex digits: obfuscatune attest measure"]  # of a TD: rtmr0, rtmr1 and rtmr2 too
"""
_SIMULATION = """# A simulator: it runs the true checks and protects nothing. The code is the one installed here.
[platform]
kinds = ["tdx"]
[simulation]
allow = true
root = "{root}"
[measurements]
mrtd = ["{code}"]
"""


class Relations(Folder):
    """A party's folder and whom it trusts."""

    @classmethod
    def init(
        cls,
        name: str,
        *,
        role: Role,
        enclave: str,
        folder: Path | str = ".",
        partner: Path | str | None = None,
        policy: Path | str | None = None,
        simulation: Path | str | None = None,
        passphrase: str | None = None,
    ) -> Self:
        """Make a folder: a new identity, party.toml, a policy, and terms that protect from any one worker.

        Args:
            name, role: who this is. enclave: its address. folder: must have none of the files yet. partner: the other
                party's ``.pub``. policy: a file to take; without it a template to fill. simulation: the root
                certificate of a simulator, to accept that and nothing else. passphrase: for the secret identity;
                without one its file is open to whoever can read it.

        Raises:
            UsageError: a file is there already, an unknown role, an address that is none, or an enclave as partner.
        """
        root = Path(folder)
        if role not in ROLES:
            raise UsageError("role of a party", got=repr(role), expected=" or ".join(ROLES))
        TlsAddress.parse(enclave)
        _check_name(name)
        if policy is not None and simulation is not None:
            raise UsageError("a policy of your own, or the one of a simulator", expected="one of the two")
        identity = Identity.generate(name)
        known = None if partner is None else PublicIdentity.load(Path(partner))
        if known is not None and known.name == name:  # both would be NAME.pub in this folder
            raise UsageError("your partner has this name too", got=name, hint="take another name")
        party = cls(
            root,
            name,
            role,
            enclave,
            root / f"{name}.key",
            root / "policy.toml" if policy is None else Path(policy),
            root / "terms.toml",
            partner_file=None if known is None else root / f"{known.name}.pub",
            allow_simulation=simulation is not None,
        )
        if policy is not None:
            read_small(Path(policy), _MAX_BYTES, "policy")
        # By name, with the mode; the secret first, and last what makes it a party's folder.
        files: dict[str, tuple[bytes, int]] = {
            f"{name}.key": (identity.to_bytes() if passphrase is None else identity.lock(passphrase), 0o600),
            f"{name}.pub": (encode(identity.public.to_dict()) + b"\n", 0o644),
        }
        if policy is None:
            text = _POLICY if simulation is None else _SIMULATION.format(root=_ROOT, code=measure_code().hex())
            files["policy.toml"] = (text.encode(), 0o644)
        if simulation is not None:
            files[_ROOT] = (read_small(Path(simulation), _MAX_BYTES, "root certificate of the simulator"), 0o644)
        files["terms.toml"] = (template(role, [] if known is None else [known.fingerprint]).encode(), 0o644)
        if known is not None and not party._place_for(known).exists():
            files[f"{known.name}.pub"] = (encode(known.to_dict()) + b"\n", 0o644)
        files[FILE] = (party.to_toml().encode(), 0o644)
        if _ROOT in files and _is(root / _ROOT, files[_ROOT][0]):
            del files[_ROOT]  # the certificate was given from this folder
        there = [each for each in files if os.path.lexists(root / each)]
        if there:
            hint = "nothing is overwritten: edit what is there, or take another folder"
            raise UsageError("file is there already", where=", ".join(there), hint=hint)
        party._make(files)
        party.keys[party.identity_file] = identity
        return party

    def _make(self, files: dict[str, tuple[bytes, int]]) -> None:
        """Write new files, by name, with the mode: all of them or none."""
        written: list[Path] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, (data, mode) in files.items():
                write_new(self.folder / name, data, mode=mode)
                written.append(self.folder / name)
            sync(self.folder)
        except OSError as error:
            for path in written:
                path.unlink(missing_ok=True)
            raise ObfuscatuneError("cannot write the folder", got=error.strerror, where=str(self.folder)) from None

    def with_partner(self, path: Path | str) -> Self:
        """Take a partner: keep the identity in the folder, name it in party.toml, and in the terms where none is yet.

        Compare the fingerprint with its owner over another channel: everything later rests on it.

        A ``.succession`` of the partner's identity is taken too: its successor becomes the partner, in the terms as
        well, or, where it was revoked, there is none. One whose time is still to come is kept until then.

        Raises:
            UsageError, FormatError: no public identity, or an enclave's; or another one of the same name is there.
            ConsentError: an identity that has ended. SealError: a statement that is not signed as it must be.
        """
        source = Path(path)
        if source.suffix == SUFFIX:
            return self._succeeded(source)
        public = PublicIdentity.load(source)
        if public == self.identity.public:
            raise UsageError("that is your own identity", where=str(path))
        self._place_for(public)
        return self._keep(public)

    def _place_for(self, public: PublicIdentity) -> Path:
        """Return where a new partner's identity is kept.

        Raises:
            ConsentError: it has ended. UsageError: another one of this name is there, or it is an enclave's.
        """
        # By its signing key: who has stolen one that was revoked would come back under another name.
        ends = load_successions(self.folder)
        if any(each.identity.signing_key == public.signing_key for each in ends):
            raise ConsentError("this identity has ended", got=f"{public.name} {public.fingerprint[:16]}")
        if any(resolve(each, ends) is None for each in ancestry(public, ends)):
            what, hint = "this identity succeeds one that is in dispute", "ask for a new one, which succeeds nobody"
            raise ConsentError(what, got=f"{public.name} {public.fingerprint[:16]}", hint=hint)
        return self._file_of(public)

    def _file_of(self, public: PublicIdentity) -> Path:
        if public.name == ENCLAVE:
            hint = "the NAME.pub that your partner's party init made"
            raise UsageError("this is an enclave's identity, not a partner's", got=public.fingerprint[:16], hint=hint)
        target = self.folder / f"{public.name}.pub"
        if target.exists() and PublicIdentity.load(target) != public:
            raise UsageError("another identity of this name is there already", where=str(target))
        return target

    def _succeeded(self, path: Path) -> Self:
        """Take the partner's word, signed, that its identity has ended, and the new one if there is one."""
        data = read_small(path, MAX_BYTES, "succession")
        found = read_succession(data, f"succession {path}")
        current = None if self.partner_file is None else PublicIdentity.load(self.partner_file)
        kept, ends = load_successions(self.folder, now=_EVER), [*load_successions(self.folder), found]
        if current is not None:
            # Of the partner's of now, or of one that it has succeeded, in however many steps: whoever owned that may
            # dispute them, as a thief's.
            fits = found.identity in ancestry(current, kept)
        else:  # or what more is said of one that has ended, and the partner with it
            fits = any(each.identity == found.identity for each in kept)
            fits = fits and resolve(found.identity, [*kept, found]) is None
        if not fits:
            raise UsageError("not the end of your partner's identity", got=found.identity.fingerprint[:16])
        ended = [each.identity for each in ends if each.identity.signing_key != found.identity.signing_key]
        for named in (found.successor, resolve(found.identity, ends)):
            if named is not None and any(named.signing_key == each.signing_key and named != each for each in ended):
                what = "the successor is an identity that has ended, under another name"
                raise ConsentError(what, got=f"{named.name} {named.fingerprint[:16]}")
        copy = self.folder / f"{found.identity.fingerprint[:16]}-{hashlib.sha256(data).hexdigest()[:16]}{SUFFIX}"
        try:
            if not copy.exists():
                write_new(copy, data, mode=0o644)
        except OSError as error:
            raise ObfuscatuneError("cannot write the folder", got=error.strerror, where=str(self.folder)) from None
        if found.time > time.time():  # it expires then: until then the partner is the partner
            return self
        heirs = {resolve(each, ends) for each in ancestry(current, ends)} if current is not None else {None}
        heir = heirs.pop() if len(heirs) == 1 else None  # one, unless somebody's in the line is in dispute
        if heir is not None:
            return self if heir == current else self._keep(heir, instead_of=current)
        line = lineage(found.identity, [*kept, found])
        return self._without_partner(*{each for pair in line for each in (pair.identity, pair.successor) if each})

    def _without_partner(self, *ended: PublicIdentity) -> Self:
        """Name no partner any more, in the terms neither: these identities have ended, or are in dispute."""
        party = dataclasses.replace(self, partner_file=None)
        try:
            party.write()
            terms = self.terms_file.read_text(encoding="utf-8")
            changed = terms
            for public in ended:
                changed = re.sub(rf'"{public.fingerprint}"(,\s*)?', "", changed)
            if changed != terms:
                self._replace_terms(changed)
        except OSError as error:
            raise ObfuscatuneError("cannot write the folder", got=error.strerror, where=str(self.folder)) from None
        return party

    def _replace_terms(self, text: str) -> None:
        """Put other terms in the place of these, whole or not at all; raises FormatError where they are none."""
        beside = self.terms_file.with_name(".terms.new")
        try:
            beside.write_text(text, encoding="utf-8")
            load_terms(beside)  # before anything is replaced
            sync(beside)
            rename(beside, self.terms_file)
        finally:
            beside.unlink(missing_ok=True)

    def trust(self, worker: Path | str, operator: str) -> Worker:
        """Add a worker, by its ``.pub``, and who operates it, to the terms that are sealed from now on.

        Raises:
            UsageError: no identity, or the terms name it already. FormatError: no usable name of an operator.
        """
        public = PublicIdentity.load(Path(worker))
        added = Worker.from_dict({"fingerprint": public.fingerprint, "operator": operator})
        terms = Terms.from_dict(self.terms, "your terms")
        if terms.workers == "any" or added.fingerprint in {each.fingerprint for each in terms.workers}:
            got = "any worker" if terms.workers == "any" else f"{public.name} {added.fingerprint[:16]}"
            raise UsageError("the terms allow it already", got=got, where=str(self.terms_file))
        if '"' in operator or "\\" in operator:
            raise UsageError("operator's name", got=repr(operator), expected='no " and no backslash')
        table = f'\n[[workers]]  # {public.name}\nfingerprint = "{added.fingerprint}"\noperator = "{operator}"\n'
        try:
            self._replace_terms(self.terms_file.read_text(encoding="utf-8") + table)
        except FormatError as error:
            hint = "write the workers as [[workers]] tables, 16 at most"
            raise UsageError(
                "the terms have no place for it", got=error.what, where=str(self.terms_file), hint=hint
            ) from None
        except OSError as error:
            raise ObfuscatuneError("cannot write the terms", got=error.strerror, where=str(self.terms_file)) from None
        return added

    def rotate(self, name: str, *, passphrase: str | None = None) -> tuple[Self, Path]:
        """Take a new identity; return the folder, and the statement for partner and operator that it succeeds the old.

        What is sealed and signed under the old one stays as it is: seal and propose anew.
        """
        _check_name(name)
        old, new = self.identity, Identity.generate(name)
        key, public = self.folder / f"{name}.key", self.folder / f"{name}.pub"
        statement = self.folder / f"{self.name}{SUFFIX}"
        there = [path.name for path in (key, public, statement) if path.exists()]
        if there:
            raise UsageError("file is there already", where=", ".join(there), hint="take another name")
        party = dataclasses.replace(self, name=name, identity_file=key)
        self._make(
            {
                key.name: (new.to_bytes() if passphrase is None else new.lock(passphrase), 0o600),
                public.name: (encode(new.public.to_dict()) + b"\n", 0o644),
                statement.name: (succeed(old, new) + b"\n", 0o644),
            }
        )
        try:
            party.write()
        except OSError as error:
            raise ObfuscatuneError("cannot write the folder", got=error.strerror, where=str(self.folder)) from None
        party.keys[key] = new
        return party, statement

    def _keep(self, public: PublicIdentity, instead_of: PublicIdentity | None = None) -> Self:
        """Write the partner's identity into the folder, and its fingerprint into the terms where it has a place."""
        target = self._file_of(public)
        party = dataclasses.replace(self, partner_file=target)
        try:
            if not target.exists():
                write_new(target, encode(public.to_dict()) + b"\n", mode=0o644)
            party.write()
            terms = self.terms_file.read_text(encoding="utf-8")
            if instead_of is not None:
                changed = terms.replace(f'"{instead_of.fingerprint}"', f'"{public.fingerprint}"')
            else:
                changed = terms.replace("\npartners = []", f'\npartners = ["{public.fingerprint}"]', 1)
            if changed != terms:
                self._replace_terms(changed)
        except OSError as error:
            raise ObfuscatuneError("cannot write the folder", got=error.strerror, where=str(self.folder)) from None
        return party


def _check_name(name: str) -> None:
    if name == ENCLAVE:
        raise UsageError("enclaves have this name", got=name, hint="take another name for yourself")


def _is(path: Path, data: bytes) -> bool:
    """Return whether a file has this content, and nothing else is there."""
    try:
        return path.read_bytes() == data
    except OSError:
        return False
