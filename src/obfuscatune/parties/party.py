"""A party in Python: a folder, and the steps of a job. The verbs ``obfuscatune party`` and ``job`` call nothing else.

party = Party.init("clinic", role="owner", enclave="tls://cloud.example:7443", partner="lab.pub", policy="mine.toml")
print(party.verify())                                      # is it the code that I have read, on real hardware?
party.seal("data", {"data.jsonl": Path("records.jsonl")})  # with terms.toml; data.card goes to the partner
signed = party.propose(partner_inputs=["model.card"], profile="enclave", adapter_to=("owner",))
for line in review(signed): print(line)
signed = party.sign(signed)                                # and the partner: party.sign(SignedJob.load(...))
party.enclave.submit(signed, party.inputs_of(signed))
for status in party.enclave.watch(signed): ...
party.enclave.fetch(signed, Path("results"))
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from obfuscatune.durable import write_new
from obfuscatune.errors import ConsentError, FormatError, ObfuscatuneError, UsageError
from obfuscatune.parties.attestation.verdict import Verdict
from obfuscatune.parties.enclave import Enclave
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.parties.reached import verify_at
from obfuscatune.parties.relations import Relations
from obfuscatune.parties.sealed.archive import seal_files
from obfuscatune.parties.sealed.card import make_card, read_card
from obfuscatune.parties.sealed.fields import Kind
from obfuscatune.parties.sealed.header import read_header
from obfuscatune.parties.terms import Terms
from obfuscatune.parties.vocabulary import Role, Worker, profile_of
from obfuscatune.settings import TrainingSettings

KINDS: dict[Role, tuple[Kind, ...]] = {"provider": ("model",), "owner": ("data", "prompts")}


class Party(Relations):
    """One party of a job, in its folder: made by :meth:`init`, read by :meth:`open`."""

    @property
    def enclave(self) -> Enclave:
        """The enclave, which each of its methods judges by this party's policy anew."""
        return Enclave(self.enclave_address, self.policy, self.identity, folder=self.folder)

    def verify(self) -> Verdict:
        """Judge fresh evidence of the enclave by this party's policy; the verdict says rule by rule what held."""
        return verify_at(self.enclave_address, self.policy)

    def seal(self, kind: Kind, files: Mapping[str, Path | bytes], *, output: Path | None = None) -> Path:
        """Seal files to the enclave, if it is accepted now, with this party's terms; write the file and its card.

        Args:
            kind: ``model`` of a provider, ``data`` or ``prompts`` of an owner. files: by name, see `model_files`.
            output: default ``KIND.sealed`` in the folder; its card, which goes to the partner, is beside it.

        Raises:
            UsageError: not this role's kind, or a file is there. AttestationError: the enclave is refused.
            FormatError: terms that are none.
        """
        path, card = self.place_of(kind, output)
        given = Terms.from_dict(self.terms, "your terms")
        if not given.partners:
            hint = "obfuscatune party verify --partner NAME.pub"
            raise UsageError("the terms name no partner: no job could use it", where=str(self.terms_file), hint=hint)
        if given.expires != "never" and given.expires <= time.time():
            what, hint = "the terms have expired, or name no day: no job could use it", "a later day for `expires`"
            raise UsageError(what, where=str(self.terms_file), hint=hint)
        terms, recipient = self.terms, self.verify().require().identity
        seal_files(path, files, kind=kind, sender=self.identity, recipients=[recipient], terms=terms)
        self._write_card(card, path)
        return path

    def place_of(self, kind: Kind, output: Path | None = None) -> tuple[Path, Path]:
        """Return where a sealed file and its card go; raises UsageError where `seal` would refuse to write them."""
        if kind not in KINDS[self.role]:
            raise UsageError("kind of input", got=kind, expected=f"{' or '.join(KINDS[self.role])} of a {self.role}")
        path = self.folder / f"{kind}.sealed" if output is None else output
        card = path.with_suffix(".card")
        if path.exists() and not card.exists():  # sealing was interrupted; it may hold older files
            raise UsageError("a sealed file without its card", where=str(path), hint="remove it, and seal again")
        for each in (path, card):
            if each.exists():
                raise UsageError("file is there already", where=str(each), hint="nothing is ever overwritten")
        return path, card

    def _write_card(self, card: Path, path: Path) -> None:
        try:
            write_new(card, make_card(path) + b"\n", mode=0o644)
        except OSError as error:
            hint = f"make room, remove {path.name}, and seal again"
            raise ObfuscatuneError("cannot write the card", got=error.strerror, where=str(card), hint=hint) from None

    def propose(
        self,
        *,
        partner_inputs: Sequence[Path | str],
        settings: TrainingSettings | None = None,
        days: float = 7.0,
        **fields: Any,
    ) -> SignedJob:
        """Return a job for both to sign, on the inputs that this folder has sealed and those of the partner's cards.

        Args:
            partner_inputs: cards, or sealed files, of the partner. settings: of the training. days: until it expires.
            fields: of `Job`: profile, switches, workers, dtype, adapter_to, ... Without workers, a profile that shares
                gets those of this party's terms, if they are as many as it takes.

        Raises:
            UsageError: an input lacks. ConsentError: the terms of an input do not allow the job; all of it named.
        """
        mine, partner = self.identity.public, self.partner
        enclave = self.verify().require().identity
        cards = [read_card(Path(path)) for path in partner_inputs]
        cards += [read_card(path) for kind in KINDS[self.role] if (path := self.folder / f"{kind}.sealed").exists()]
        found = {card.header.kind: card for card in cards}
        lacking = [kind for kind in ("model", "data") if kind not in found]
        if lacking:
            hint = "obfuscatune party seal, and the partner's .card with --partner_input"
            raise UsageError("an input of the job lacks", expected=" and ".join(lacking), hint=hint)
        for kind, card in found.items():
            maker = mine if kind in KINDS[self.role] else partner
            if card.header.sender != maker:
                raise ConsentError(f"{kind} is sealed by somebody else", got=card.header.sender.fingerprint[:16])
            if enclave.fingerprint not in {recipient.fingerprint for recipient in card.header.recipients}:
                hint = "seal it again: obfuscatune party seal"
                raise ConsentError(f"{kind} is sealed to another enclave", expected=enclave.fingerprint[:16], hint=hint)
        profile, workers = profile_of(fields.get("profile", "enclave"), fields.get("switches", {})), self._trusted()
        if profile.share_workers == len(workers) and not fields.get("workers"):
            fields["workers"] = workers
        provider, owner = (mine, partner) if self.role == "provider" else (partner, mine)
        now = int(time.time())
        job = Job(
            provider=provider.fingerprint,
            owner=owner.fingerprint,
            enclave=enclave.fingerprint,
            model=found["model"].digest,
            data=found["data"].digest,
            prompts=found["prompts"].digest if "prompts" in found else None,
            training={} if settings is None else settings.changed(),
            created=now,
            expires=now + int(days * 86_400),
            **fields,
        )
        for kind, card in found.items():
            side: Role = "provider" if kind == "model" else "owner"
            _require(Terms.from_dict(card.header.terms, f"terms of the {kind}"), job, side, f"terms of the {kind}")
        return SignedJob(job)

    def _trusted(self) -> tuple[Worker, ...]:
        workers = Terms.from_dict(self.terms, "your terms").workers
        return () if workers == "any" else workers

    def sign(self, signed: SignedJob) -> SignedJob:
        """Return the job with this party's signature.

        Raises:
            ConsentError: this party has not this role in it, the partner is another, its terms do not allow it, or it
                has expired.
        """
        identity, job = self.identity, signed.job
        if job.role_of(identity.public.fingerprint) != self.role:
            raise ConsentError(f"you are not the {self.role} of this job", got=f"{self.name}")
        other = job.owner if self.role == "provider" else job.provider
        if other != self.partner.fingerprint:
            raise ConsentError(
                "the job is with another partner", got=other[:16], expected=self.partner.fingerprint[:16]
            )
        if job.expires <= time.time():
            raise ConsentError("the job has expired", hint="make a new one: obfuscatune job propose")
        _require(Terms.from_dict(self.terms, "your terms"), job, self.role, "your terms")
        return signed.sign(identity)

    def inputs_of(self, signed: SignedJob) -> list[Path]:
        """Return this party's sealed inputs of a job, from the folder.

        Raises:
            UsageError: one lacks. FormatError: one lacks, and here is a file that cannot be read: it may be the one.
        """
        wanted = {kind: digest for kind, digest in signed.job.inputs.items() if kind in KINDS[self.role]}
        here, unreadable = dict[str, Path](), list[ObfuscatuneError]()
        for path in sorted(self.folder.glob("*.sealed")):
            try:
                here[read_header(path).digest] = path
            except (FormatError, UsageError) as error:  # of another job, perhaps: that is no fault of this one
                unreadable.append(error)
        lacking = [kind for kind, digest in wanted.items() if digest not in here]
        if lacking and unreadable:
            raise unreadable[0]
        if lacking:
            what = "sealed input of the job is not in the folder"
            raise UsageError(what, expected=", ".join(lacking), where=str(self.folder))
        return [here[digest] for digest in wanted.values()]


def _require(terms: Terms, job: Job, role: Role, whose: str) -> None:
    faults = terms.faults(job, role, time.time())
    if faults:
        raise ConsentError(f"{whose} do not allow this job", got="; ".join(faults))
