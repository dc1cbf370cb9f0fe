"""A party's folder: ``party.toml`` says who this is, whom it trusts and which enclave it uses; all verbs find it.

    name = "clinic"
    role = "owner"                          # or "provider"
    identity = "clinic.key"
    policy = "policy.toml"                  # which enclaves are accepted
    terms = "terms.toml"                    # what is sealed with every file
    enclave = "tls://cloud.example:7443"
    partner = "lab.pub"                     # the other party
    allow_simulation = true                 # only where a simulator is meant, which protects nothing

Paths are relative to the folder. What a party does with it is in `party`.
"""

import dataclasses
import os
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from obfuscatune.durable import write_new
from obfuscatune.errors import ConsentError, FormatError, ObfuscatuneError, UsageError
from obfuscatune.parties.attestation.measurement import measure_code
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.channel.address import TlsAddress
from obfuscatune.parties.identity import Identity, PublicIdentity, read_small
from obfuscatune.parties.succession import MAX_BYTES, SUFFIX, load_successions, read_succession, succeed
from obfuscatune.parties.terms import load_terms, template
from obfuscatune.parties.vocabulary import ROLES, Role

FILE = "party.toml"
_MAX_BYTES = 65_536
_TEXTS = ("name", "role", "identity", "policy", "terms", "enclave")
_POLICY = """# Which enclaves you accept. Fill in the measurements of an image that you have built or read.
# docs/attestation.md has all keys.
[platform]
kinds = []            # some of "tdx", "snp", "sgx", "tpm"
[measurements]
# mrtd = ["96 hex digits: obfuscatune attest measure"]
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


@dataclass(frozen=True)
class Folder:
    """A party's folder, read.

    Attributes:
        folder: where it is. name, role: of the party. enclave_address: ``tls://HOST:PORT``. identity_file,
            policy_file, terms_file: paths. partner_file: of the other party's ``.pub``, if it is known.
        allow_simulation: whether a simulator is meant.
    """

    folder: Path
    name: str
    role: Role
    enclave_address: str
    identity_file: Path
    policy_file: Path
    terms_file: Path
    partner_file: Path | None = None
    allow_simulation: bool = False

    # the folder

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
        """Make a folder: a new identity, party.toml, a policy, and terms that show a worker nothing.

        Args:
            name, role: who this is. enclave: its address. folder: must have none of the files yet. partner: the other
                party's ``.pub``. policy: a file to take; without it a template to fill. simulation: the root
                certificate of a simulator, to accept that and nothing else. passphrase: for the secret identity;
                without one its file is open to whoever can read it.

        Raises:
            UsageError: a file is there already, an unknown role, or an address that is none.
        """
        root = Path(folder)
        if role not in ROLES:
            raise UsageError("role of a party", got=repr(role), expected=" or ".join(ROLES))
        TlsAddress.parse(enclave)
        if policy is not None and simulation is not None:
            raise UsageError("a policy of your own, or the one of a simulator", expected="one of the two")
        identity = Identity.generate(name)
        names = [FILE, f"{name}.key", f"{name}.pub", "policy.toml", "terms.toml"]
        there = [each for each in names if (root / each).exists()]
        if there:
            hint = "nothing is overwritten: take another folder"
            raise UsageError("file is there already", where=", ".join(there), hint=hint)
        party = cls(
            root,
            name,
            role,
            enclave,
            root / f"{name}.key",
            root / "policy.toml" if policy is None else Path(policy),
            root / "terms.toml",
            allow_simulation=simulation is not None,
        )
        known = None if partner is None else PublicIdentity.load(Path(partner))
        texts: dict[str, str | bytes] = {
            f"{name}.pub": encode(identity.public.to_dict()) + b"\n",
            **({"policy.toml": _policy(simulation)} if policy is None else {}),
            "terms.toml": template(role, [] if known is None else [known.fingerprint]),
        }
        try:
            root.mkdir(parents=True, exist_ok=True)
            write_new(party.identity_file, identity.to_bytes() if passphrase is None else identity.lock(passphrase))
            for each, text in texts.items():
                write_new(root / each, text if isinstance(text, bytes) else text.encode(), mode=0o644)
            if simulation is not None:
                shutil.copyfile(simulation, root / "simulation-root.pem")
            party._write()
        except OSError as error:
            raise ObfuscatuneError("cannot write the folder", got=error.strerror, where=str(root)) from None
        return party if partner is None else party.with_partner(partner)

    @classmethod
    def open(cls, folder: Path | str = ".") -> Self:
        """Read a folder; raises UsageError where there is none, FormatError for anything in it that does not fit."""
        root = Path(folder)
        path = root / FILE
        if not path.exists():
            hint = "obfuscatune party init NAME --role owner --enclave tls://HOST:7443"
            raise UsageError("no party's folder", where=str(root), expected=FILE, hint=hint)
        try:
            fields = tomllib.loads(read_small(path, _MAX_BYTES, FILE).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if isinstance(error, UsageError):
                raise
            raise FormatError(f"{FILE} is not TOML", got=type(error).__name__, where=str(path)) from None
        known = {*_TEXTS, "partner", "allow_simulation"}
        faults = [f"unknown {name[:40]!r}" for name in sorted(set(fields) - known)]
        faults += [f"{name} is missing, or no text" for name in _TEXTS if type(fields.get(name)) is not str]
        faults += ["partner is no text"] if type(fields.get("partner", "")) is not str else []
        faults += (
            ["allow_simulation is not true or false"] if type(fields.get("allow_simulation", False)) is not bool else []
        )
        if fields.get("role") not in ROLES:
            faults.append(f"role is not {' or '.join(ROLES)}")
        if faults:
            raise FormatError(f"{FILE} does not fit", got="; ".join(faults), where=str(path))
        partner = fields.get("partner")
        return cls(
            folder=root,
            name=fields["name"],
            role=fields["role"],
            enclave_address=fields["enclave"],
            identity_file=root / fields["identity"],
            policy_file=root / fields["policy"],
            terms_file=root / fields["terms"],
            partner_file=None if not partner else root / partner,
            allow_simulation=fields.get("allow_simulation", False),
        )

    def with_partner(self, path: Path | str) -> Self:
        """Take a partner: keep the identity in the folder, name it in party.toml, and in the terms where none is yet.

        Compare the fingerprint with its owner over another channel: everything later rests on it.

        A ``.succession`` of the partner's identity is taken too: its successor becomes the partner, in the terms as
        well, or, where it was revoked, there is none.

        Raises:
            UsageError, FormatError: no public identity; or another one of the same name is there.
            ConsentError: an identity that has ended. SealError: a statement that is not signed as it must be.
        """
        source = Path(path)
        if source.suffix == SUFFIX:
            return self._succeeded(source)
        public = PublicIdentity.load(source)
        if public == self.identity.public:
            raise UsageError("that is your own identity", where=str(path))
        if any(each.identity == public for each in load_successions(self.folder)):
            raise ConsentError("this identity has ended", got=f"{public.name} {public.fingerprint[:16]}")
        return self._keep(public)

    def _succeeded(self, path: Path) -> Self:
        """Take the partner's word, signed, that its identity has ended, and the new one if there is one."""
        data = read_small(path, MAX_BYTES, "succession")
        found = read_succession(data, f"succession {path}")
        if found.identity != self.partner:
            raise UsageError("not the end of your partner's identity", got=found.identity.fingerprint[:16])
        kept = self.folder / f"{found.identity.fingerprint[:16]}{SUFFIX}"
        try:
            if not kept.exists():
                write_new(kept, data, mode=0o644)
        except OSError as error:
            raise ObfuscatuneError("cannot write the folder", got=error.strerror, where=str(self.folder)) from None
        if found.successor is not None:
            return self._keep(found.successor, instead_of=found.identity)
        party = dataclasses.replace(self, partner_file=None)
        party._write()
        return party

    def rotate(self, name: str, *, passphrase: str | None = None) -> tuple[Self, Path]:
        """Take a new identity; return the folder, and the statement for partner and operator that it succeeds the old.

        What is sealed and signed under the old one stays as it is: seal and propose anew.
        """
        old, new = self.identity, Identity.generate(name)
        key, public = self.folder / f"{name}.key", self.folder / f"{name}.pub"
        statement = self.folder / f"{self.name}{SUFFIX}"
        there = [path.name for path in (key, public, statement) if path.exists()]
        if there:
            raise UsageError("file is there already", where=", ".join(there), hint="take another name")
        party = dataclasses.replace(self, name=name, identity_file=key)
        try:
            write_new(key, new.to_bytes() if passphrase is None else new.lock(passphrase))
            write_new(public, encode(new.public.to_dict()) + b"\n", mode=0o644)
            write_new(statement, succeed(old, new) + b"\n", mode=0o644)
            party._write()
        except OSError as error:
            raise ObfuscatuneError("cannot write the folder", got=error.strerror, where=str(self.folder)) from None
        return party, statement

    def _keep(self, public: PublicIdentity, instead_of: PublicIdentity | None = None) -> Self:
        """Write the partner's identity into the folder, and its fingerprint into the terms where it has a place."""
        target = self.folder / f"{public.name}.pub"
        if target.exists() and PublicIdentity.load(target) != public:
            raise UsageError("another identity of this name is there already", where=str(target))
        party = dataclasses.replace(self, partner_file=target)
        try:
            if not target.exists():
                write_new(target, encode(public.to_dict()) + b"\n", mode=0o644)
            party._write()
            terms = self.terms_file.read_text(encoding="utf-8")
            if instead_of is not None:
                changed = terms.replace(f'"{instead_of.fingerprint}"', f'"{public.fingerprint}"')
            else:
                changed = terms.replace("\npartners = []", f'\npartners = ["{public.fingerprint}"]', 1)
            if changed != terms:
                self.terms_file.write_text(changed, encoding="utf-8")
        except OSError as error:
            raise ObfuscatuneError("cannot write the folder", got=error.strerror, where=str(self.folder)) from None
        return party

    def _write(self) -> None:
        lines = [
            "# Who this is, whom it trusts, which enclave it uses. Paths are relative to this folder.",
            f'name = "{self.name}"',
            f'role = "{self.role}"',
            *[
                f'{name} = "{os.path.relpath(getattr(self, f"{name}_file"), self.folder)}"'
                for name in ("identity", "policy", "terms")
            ],
            f'enclave = "{self.enclave_address}"',
            *([] if self.partner_file is None else [f'partner = "{os.path.relpath(self.partner_file, self.folder)}"']),
            *(["allow_simulation = true  # it protects nothing"] if self.allow_simulation else []),
        ]
        beside = self.folder / f".{FILE}.new"
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
        beside.replace(self.folder / FILE)

    # who and where

    @property
    def identity(self) -> Identity:
        """The party's secret identity, read from its file."""
        return Identity.load(self.identity_file)

    @property
    def partner(self) -> PublicIdentity:
        """The other party; raises UsageError where none is named yet."""
        if self.partner_file is None:
            hint = "obfuscatune party verify --partner NAME.pub"
            raise UsageError("no partner yet", where=str(self.folder / FILE), hint=hint)
        return PublicIdentity.load(self.partner_file)

    @property
    def policy(self) -> Policy:
        """What this party takes for an enclave; simulation must be allowed in party.toml too."""
        policy = Policy.load(self.policy_file)
        if policy.allow_simulation and not self.allow_simulation:
            hint = f"allow_simulation = true in {FILE} if that is meant: a simulator protects nothing"
            raise UsageError("policy allows simulation", where=str(self.policy_file), hint=hint)
        return policy

    @property
    def terms(self) -> dict[str, Any]:
        """This party's terms, as they are sealed with its files."""
        return load_terms(self.terms_file)


def _policy(simulation: Path | str | None) -> str:
    if simulation is None:
        return _POLICY
    read_small(Path(simulation), _MAX_BYTES, "root certificate of the simulator")
    return _SIMULATION.format(root="simulation-root.pem", code=measure_code().hex())
