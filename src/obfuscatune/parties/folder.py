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

import json
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from obfuscatune.durable import rename, sync
from obfuscatune.errors import ConsentError, FormatError, UsageError
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.files import read_small
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.membership import resolve
from obfuscatune.parties.succession import ancestry, load_successions
from obfuscatune.parties.terms import load_terms
from obfuscatune.parties.vocabulary import ROLES, Role

FILE = "party.toml"
_MAX_BYTES = 65_536
_TEXTS = ("name", "role", "identity", "policy", "terms", "enclave")


@dataclass(frozen=True)
class Folder:
    """A party's folder, read.

    Attributes:
        folder: where it is. name, role: of the party. enclave_address: ``tls://HOST:PORT``. identity_file,
            policy_file, terms_file: paths. partner_file: of the other party's ``.pub``, if it is known.
        allow_simulation: whether a simulator is meant. keys: secret identities that were read already, by file; a
            record that is made from this one has them too, so that a passphrase is asked for once.
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
    keys: dict[Path, Identity] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path | str = ".") -> Self:
        """Read a folder; raises UsageError where there is none, FormatError for anything in it that does not fit."""
        root = Path(folder)
        path = root / FILE
        if not path.exists():
            hint = "obfuscatune party init NAME --role owner --enclave tls://HOST:7443"
            raise UsageError("no party's folder", where=str(root), expected=FILE, hint=hint)
        try:
            fields = tomllib.loads(read_small(path, _MAX_BYTES, FILE).decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            if isinstance(error, UsageError):
                raise
            got = str(error) if isinstance(error, tomllib.TOMLDecodeError) else type(error).__name__
            raise FormatError(f"{FILE} is not TOML", got=got, where=str(path)) from None
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

    def write(self) -> None:
        """Write party.toml as this record is. Raises OSError."""
        beside = self.folder / f".{FILE}.new"
        try:
            beside.write_text(self.to_toml(), encoding="utf-8")
            sync(beside)
            rename(beside, self.folder / FILE)
        finally:
            beside.unlink(missing_ok=True)

    def to_toml(self) -> str:
        """Return the text of party.toml; raises UsageError for a path that it cannot hold."""
        lines = [
            "# Who this is, whom it trusts, which enclave it uses. Paths are relative to this folder.",
            f"name = {_quoted(self.name)}",
            f"role = {_quoted(self.role)}",
            *[f"{name} = {self._place(getattr(self, f'{name}_file'))}" for name in ("identity", "policy", "terms")],
            f"enclave = {_quoted(self.enclave_address)}",
            *([] if self.partner_file is None else [f"partner = {self._place(self.partner_file)}"]),
            *(["allow_simulation = true  # it protects nothing"] if self.allow_simulation else []),
        ]
        return "\n".join(lines) + "\n"

    def _place(self, path: Path) -> str:
        return _quoted(os.path.relpath(path, self.folder))

    @property
    def identity(self) -> Identity:
        """The party's secret identity, read from its file once."""
        if self.identity_file not in self.keys:
            self.keys[self.identity_file] = Identity.load(self.identity_file)
        return self.keys[self.identity_file]

    @property
    def partner(self) -> PublicIdentity:
        """The other party; raises UsageError where none is named yet, ConsentError where its identity has ended.

        So it has where one that it succeeds is in dispute: a thief may have made it, and as many before it.
        """
        if self.partner_file is None:
            hint = "obfuscatune party verify --partner NAME.pub"
            raise UsageError("no partner yet", where=str(self.folder / FILE), hint=hint)
        public = PublicIdentity.load(self.partner_file)
        ends = load_successions(self.folder)
        if any(resolve(each, ends) != public for each in ancestry(public, ends)):
            hint = "ask for its new identity: obfuscatune party verify --partner"
            raise ConsentError("your partner's identity has ended", got=f"{public.name}", hint=hint)
        return public

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


def _quoted(text: str) -> str:
    """Return a string of TOML, which is JSON's where no control character and no broken UTF-8 is in it."""
    if not text.isprintable():
        raise UsageError(f"{FILE} cannot hold this name of a file", got=ascii(text), hint="give the file another name")
    return json.dumps(text, ensure_ascii=False)
