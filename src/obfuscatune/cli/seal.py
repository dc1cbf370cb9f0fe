"""``obfuscatune seal``: encrypt what you own for an attested enclave, and sign it."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from obfuscatune.cli.connecting import SIMULATION_FLAG, attested_identity
from obfuscatune.cli.options import argument, option, takes
from obfuscatune.cli.output import check_new_file
from obfuscatune.errors import UsageError

if TYPE_CHECKING:
    from obfuscatune.parties.identity import PublicIdentity
    from obfuscatune.parties.sealed.fields import Kind

_ROLES: dict[str, Literal["provider", "owner"]] = {"model": "provider", "data": "owner", "prompts": "owner"}
HELP = "Seal a model, private text or prompts, so that only the recipients can open them."


@dataclass(frozen=True, kw_only=True)
class SealOptions:
    """Who seals, for whom, on which terms, to where."""

    identity: Path = option("your NAME.key, which signs the file")
    output: Path = option("the sealed file, which must not exist")
    recipient: list[Path] | None = option("NAME.pub of one who can open it; repeatable", None)
    evidence: Path | None = option("evidence of an enclave, which becomes a recipient if --policy accepts it", None)
    policy: Path | None = option("policy file that judges --evidence", None)
    allow_simulation: bool = option(
        "accept evidence of a simulator, which protects nothing, if --policy does", False, flag=SIMULATION_FLAG
    )
    terms: Path | None = option("TOML file of your conditions, signed with the file; `seal terms` prints one", None)


@dataclass(frozen=True, kw_only=True)
class ModelSealOptions(SealOptions):
    """Options of ``obfuscatune seal model``."""

    directory: Path = argument("directory of a transformers model with safetensors", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class FileSealOptions(SealOptions):
    """Options of ``obfuscatune seal data`` and ``seal prompts``."""

    file: Path = argument("JSONL file", metavar="FILE")


@takes(ModelSealOptions)
def model(options: ModelSealOptions) -> None:
    """Seal a model: configuration, tokenizer and safetensors. Pickles, code and links are refused.

    A model that no enclave would train is refused too: its tokenizer is missing or another model's, or tensors are
    missing, superfluous or not finite.
    """
    from obfuscatune.parties.sealed.models import model_files
    from obfuscatune.training.loading import check_model

    check_new_file(options.output, "--output")
    files = model_files(options.directory)
    check_model(options.directory)
    _seal(options, "model", files)


@takes(FileSealOptions)
def data(options: FileSealOptions) -> None:
    """Seal rows to fine-tune on: text, prompt + completion, or messages. Every row is checked first."""
    from obfuscatune.training.data import read_rows

    check_new_file(options.output, "--output")
    read_rows(options.file)
    _seal(options, "data", {"data.jsonl": options.file})


@takes(FileSealOptions)
def prompts(options: FileSealOptions) -> None:
    """Seal rows with a prompt each, text or messages, to be completed. Every row is checked first."""
    from obfuscatune.training.data import read_prompts

    check_new_file(options.output, "--output")
    read_prompts(options.file)
    _seal(options, "prompts", {"prompts.jsonl": options.file})


def _seal(options: SealOptions, kind: "Kind", files: Mapping[str, Path | bytes]) -> None:
    from obfuscatune.parties.identity import Identity
    from obfuscatune.parties.sealed.archive import seal_files

    terms = _terms(options, kind)
    recipients = _recipients(options)
    digest = seal_files(
        options.output,
        files,
        kind=kind,
        sender=Identity.load(options.identity),
        recipients=recipients,
        terms=terms,
        progress=sys.stderr.isatty(),
    )
    print(f"{options.output}  {digest}")
    for recipient in recipients:
        print(f"  for {recipient.name}  {recipient.fingerprint}", file=sys.stderr)


def _terms(options: SealOptions, kind: "Kind") -> "dict[str, Any]":
    """The owner's conditions; without any, nothing is sealed, and a template is shown."""
    from obfuscatune.parties.terms import load_terms, template

    if options.terms is not None:
        return load_terms(options.terms)
    role = _ROLES[kind]
    print(template(role), file=sys.stderr)
    hint = f"above is a template, which gives no worker anything: obfuscatune seal terms --role {role} > terms.toml"
    raise UsageError("no terms: what an enclave may do with it", expected="--terms FILE", hint=hint)


@dataclass(frozen=True, kw_only=True)
class TermsOptions:
    """Options of ``obfuscatune seal terms``."""

    role: Literal["provider", "owner"] = option("whose terms: of the model, or of data and prompts", "owner")
    partner: list[Path] | None = option("NAME.pub of who the other party may be; repeatable", None)


@takes(TermsOptions)
def terms(options: TermsOptions) -> None:
    """Print a template of terms. Unchanged, it allows nothing that shows a worker anything.

    Whatever terms do not allow is refused.
    """
    from obfuscatune.parties.identity import PublicIdentity
    from obfuscatune.parties.terms import template

    partners = [PublicIdentity.load(path).fingerprint for path in options.partner or ()]
    print(template(options.role, partners), end="")


def _recipients(options: SealOptions) -> "list[PublicIdentity]":
    from obfuscatune.parties.identity import PublicIdentity

    found = [PublicIdentity.load(path) for path in options.recipient or ()]
    if (options.evidence is None) != (options.policy is None):
        raise UsageError("--evidence and --policy belong together", hint="a policy judges the evidence of an enclave")
    if options.evidence is not None and options.policy is not None:
        found.append(attested_identity(options.evidence, options.policy, options.allow_simulation))
    if not found:
        raise UsageError("no recipient", expected="--recipient NAME.pub, or --evidence FILE --policy FILE")
    return found


_EXAMPLE = "--identity clinic.key --recipient enclave.pub --terms terms.toml --output clinic.sealed"
COMMANDS = {
    "model": (
        model,
        "Examples:\n\nobfuscatune seal model DIR --identity lab.key --recipient enclave.pub --terms terms.toml "
        "--output model.sealed\n\n"
        "obfuscatune seal model DIR --identity lab.key --evidence enclave.evidence --policy lab.toml "
        "--terms terms.toml --output model.sealed",
    ),
    "data": (data, f"Examples:\n\nobfuscatune seal data records.jsonl {_EXAMPLE}"),
    "terms": (terms, "Examples:\n\nobfuscatune seal terms --role owner --partner lab.pub > terms.toml"),
    "prompts": (prompts, f"Examples:\n\nobfuscatune seal prompts questions.jsonl {_EXAMPLE}"),
}
