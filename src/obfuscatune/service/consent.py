"""Consent: what both owners must have agreed to before the enclave does anything with a job.

Two independent checks. The job must bear both signatures, be for this enclave, and not be over. Each input must be made
by the owner that the job names, and its terms, sealed and signed together with it, must allow what the job asks for.
So neither a stolen job file nor a careless signature gives away more than the owner of an input has put down with it.
"""

from collections.abc import Container

from obfuscatune.errors import ConsentError
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.parties.sealed.fields import Header
from obfuscatune.parties.terms import VERSION, Terms
from obfuscatune.parties.vocabulary import ROLES, Role

# Who makes which input.
OWNERS: dict[str, Role] = {"model": "provider", "data": "owner", "prompts": "owner"}


class LackingError(ConsentError):
    """What both have agreed to is not here now. The operator can change that, so the job may be submitted again."""


def check_job(signed: SignedJob, *, enclaves: frozenset[str], now: float, ended: Container[str] = frozenset()) -> None:
    """Check what the job itself tells; its signatures were verified when it was read.

    Args:
        signed: the job. enclaves: fingerprints of this enclave and of those that it goes on for. now: Unix seconds.
        ended: fingerprints of whom no job may be: their identity has ended, or they are no members.

    Raises:
        ConsentError: not signed by both, for another enclave, expired, or of an identity that has ended.
    """
    job = signed.job
    missing = signed.missing()
    if missing:
        hint = "each of the two: obfuscatune job sign; the file that the last one wrote has both signatures"
        raise ConsentError("job is not signed by both", got=f"no signature of the {' and '.join(missing)}", hint=hint)
    gone = [role for role in ROLES if getattr(job, role) in ended]
    if gone:
        hint = "make a new job, with the identity that succeeds it"
        raise ConsentError(f"the identity of the {' and of the '.join(gone)} has ended, or left", hint=hint)
    if job.enclave not in enclaves:
        expected = " or ".join(sorted(name[:16] for name in enclaves))
        raise ConsentError("job is for another enclave", got=job.enclave[:16], expected=expected)
    if now >= job.expires:
        raise ConsentError("job has expired", hint="make a new one, and let both sign it")


def check_input(signed: SignedJob, kind: str, digest: str, header: Header, *, now: float) -> Terms:
    """Check a sealed input against the job and against its owner's terms, and return these.

    Args:
        signed: the job. kind: ``model``, ``data`` or ``prompts``. digest, header: of the sealed file, signature
            verified. now: Unix seconds.

    Raises:
        ConsentError: another file or maker than the job names, or terms that the job goes beyond: all of them named.
        FormatError: terms that are none.
    """
    job = signed.job
    role = OWNERS[kind]
    if job.inputs.get(kind) != digest or header.kind != kind:
        raise ConsentError(f"not the {kind} of the job", got=f"{header.kind} {digest[:16]}")
    if header.sender != signed.party(role):
        raise ConsentError(f"{kind} was not sealed by the job's {role}", got=header.sender.fingerprint[:16])
    version = (header.terms or {}).get("version")
    if version != VERSION or type(version) is not int:
        what = f"no terms of the {kind}" if header.terms is None else f"terms of the {kind} are of another version"
        hint = "terms state quotas now, and refuse what they leave out: seal it again (obfuscatune seal terms)"
        raise ConsentError(what, expected=f"version {VERSION}", hint=hint)
    terms = Terms.from_dict(header.terms, f"terms of the {kind}")
    faults = terms.faults(job, role, now)
    if faults:
        raise ConsentError(f"terms of the {kind} do not allow", got="; ".join(faults))
    return terms


def check_query(job: Job, party: str, *, prompts: int, before: int, tokens: int, now: float) -> None:
    """Check a query of the running enclave against the job.

    Args:
        job: one that is done. party: fingerprint of who asks. prompts: asked for now. before: answered so far.
        tokens: longest completion asked for. now: Unix seconds.

    Raises:
        ConsentError: no right to queries, more or longer ones than the job allows, or it has expired.
    """
    if job.role_of(party) not in job.queries_by:
        raise ConsentError("the job gives this party no queries")
    if now >= job.expires:
        raise ConsentError("job has expired", hint="make a new one, and let both sign it")
    if tokens > job.max_new_tokens:
        raise ConsentError("completions longer than the job allows", got=tokens, expected=f"<= {job.max_new_tokens}")
    if before + prompts > job.max_queries:
        got, expected = f"{before} before and {prompts} now", f"at most {job.max_queries}"
        raise ConsentError("queries of the job are used up", got=got, expected=expected)
