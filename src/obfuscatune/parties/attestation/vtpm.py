"""A TPM 2.0 as platform: quotes over its PCRs, a key that only these PCR values give, a counter that only goes up.

What it is worth depends on who runs the TPM. The host of a virtual TPM that is not itself in a TEE can read and put
back all of its state. And the PCRs say what was booted, not what a process does: root in the same machine is not kept
out.

The quote covers the PCRs of ``PCRS`` in the SHA-256 bank; its qualifying data is SHA-256(report data), because a TPM
takes no more than one hash. PCR 10 is left out: the kernel's integrity measurements change it with every program run.

The sealing key is computed by the TPM and stored nowhere,

    key = HMAC-SHA256(K, "obfuscatune sealing key 1")

where K is a primary key: the TPM derives it from its own seed and the key's template, and the template holds the policy
"these PCR values". Other PCR values mean another template, and the old one's K refuses to work. A random key sealed to
the same policy and kept in the TPM would be weaker: whoever boots another system could replace it by one that he knows,
sealed to the good PCR values (the policy is public), and read what the good system seals later.
"""

import hashlib
import re
from pathlib import Path

from obfuscatune.errors import AttestationError
from obfuscatune.parties.attestation.evidence import Attester, Quote
from obfuscatune.parties.attestation.quoting import SEALING_KEY_BYTES, check_report_data
from obfuscatune.parties.attestation.tpm2_tools import Tools
from obfuscatune.parties.canonical import decode, encode
from obfuscatune.parties.files import read_small

PCRS = (*range(10), *range(11, 16))
BANK = "sha256"
_DIGEST_BYTES = 32
# One policy names at most eight PCRs in tpm2-tools; of two, one after the other, both must hold.
_HALVES = tuple(f"{BANK}:{','.join(map(str, part))}" for part in (PCRS[:8], PCRS[8:]))

_KEY_HANDLE = "0x81018F01"  # persistent, in the owner's range
_COUNTER_HANDLE = "0x01808F01"
# "restricted": the TPM signs nothing with it that starts like a quote and is none.
_ATTESTATION_KEY = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"
# No "userwithauth": there is no way around the policy. "noda": a failed policy locks nobody out.
_SEALING_KEY = "fixedtpm|fixedparent|sensitivedataorigin|sign|noda"
_SEALING_LABEL = b"obfuscatune sealing key 1"
_MAX_FILE_BYTES = 4096

_VENDOR = re.compile(rb'TPM2_PT_VENDOR_STRING_1:\s+raw: \S+\s+value: "([^"\n]*)"')
# What swtpm (libtpms) and Microsoft's reference simulator call themselves.
_SIMULATORS = (b"SW", b"xCG")
_NV_ATTRIBUTES = re.compile(rb"attributes:\s+friendly: \S+\s+value: (0x[0-9A-Fa-f]{1,8})\s+size: ([0-9]{1,5})\s")
_NV_WRITTEN = 1 << 29


class VtpmPlatform:
    """The platform "tpm": the TPM that TPM2TOOLS_TCTI names, otherwise ``/dev/tpmrm0``.

    Attributes:
        name: for people. counter: in the TPM's own memory.
        attester: signs with a key that the TPM makes at its first use and keeps.
        simulated: whether the TPM calls itself a simulator; a verifier relies on the keys that its policy lists.

    Raises:
        AttestationError: no tpm2-tools, or no TPM that answers.
    """

    name = "TPM"

    def __init__(self) -> None:
        self._tools = Tools()
        vendor = _VENDOR.search(self._tools.run("tpm2_getcap", "properties-fixed"))
        self.simulated = vendor is None or vendor[1].startswith(_SIMULATORS)
        self.attester: Attester = VtpmAttester(self._tools)
        self.counter = VtpmCounter(self._tools)

    def sealing_key(self) -> bytes:
        """Return 32 secret bytes that this TPM gives only while its PCRs have the values that they have now.

        Raises:
            AttestationError: the TPM refuses.
        """
        tools = self._tools
        with tools.work() as directory:
            session, policy, key, label = (directory / name for name in ("session", "policy", "key", "label"))
            tools.run("tpm2_startauthsession", "-Q", "-S", session)  # a trial, which only computes the policy
            self._name_pcrs(session, "-L", policy)
            tools.run("tpm2_flushcontext", session)
            tools.run(
                *("tpm2_createprimary", "-Q", "-C", "o", "-g", "sha256", "-G", "hmac"),
                *("-L", policy, "-a", _SEALING_KEY, "-c", key),
            )
            tools.run("tpm2_flushcontext", "--transient-object")  # the context in the file is what the next one loads
            tools.run("tpm2_startauthsession", "-Q", "-S", session, "--policy-session")
            self._name_pcrs(session)
            label.write_bytes(_SEALING_LABEL)
            secret = tools.run("tpm2_hmac", "-c", key, "-p", f"session:{session}", label)
        if len(secret) != SEALING_KEY_BYTES:
            raise AttestationError("sealing key of the TPM", got=f"{len(secret)} bytes", expected=SEALING_KEY_BYTES)
        return secret

    def measurements(self) -> dict[str, str]:
        """Return the values of the PCRs in a quote of this moment; raises AttestationError where the TPM refuses."""
        values = decode(self.attester.quote(bytes(64)).extras["pcrs"], "PCR values")[BANK]
        return {f"pcr{index}": value for index, value in values.items()}

    def _name_pcrs(self, session: Path, *last: str | Path) -> None:
        first, second = _HALVES
        self._tools.run("tpm2_policypcr", "-Q", "-S", session, "-l", first)
        self._tools.run("tpm2_policypcr", "-Q", "-S", session, "-l", second, *last)


class VtpmAttester:
    """Quotes by an attestation key (ECDSA P-256) that never leaves the TPM."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def quote(self, report_data: bytes) -> Quote:
        """Return a TPMS_ATTEST over SHA-256(``report_data``), with signature, key (PEM) and PCR values beside it.

        Raises:
            AttestationError: the TPM refuses.
        """
        check_report_data(report_data)
        with self._tools.work() as directory:
            self._make_key(directory / "context")
            message, extras = quote_pcrs(self._tools, directory, _KEY_HANDLE, report_data)
            key = directory / "key"
            self._tools.run("tpm2_readpublic", "-Q", "-c", _KEY_HANDLE, "-f", "pem", "-o", key)
            return Quote("tpm", message, {**extras, "key": _read(key)})

    def _make_key(self, context: Path) -> None:
        if not self._tools.has("handles-persistent", _KEY_HANDLE):
            self._tools.run(
                *("tpm2_createprimary", "-Q", "-C", "e", "-g", "sha256", "-G", "ecc256:ecdsa-sha256:null"),
                *("-a", _ATTESTATION_KEY, "-c", context),
            )
            self._tools.run("tpm2_evictcontrol", "-Q", "-C", "o", "-c", context, _KEY_HANDLE)


def quote_pcrs(tools: Tools, directory: Path, key: str, report_data: bytes) -> tuple[bytes, dict[str, bytes]]:
    """Return a TPMS_ATTEST over ``PCRS`` and SHA-256(``report_data``), and beside it ``signature`` and ``pcrs``.

    Args:
        tools: within `Tools.work`, which gave ``directory``. key: handle of the attestation key.

    Raises:
        AttestationError: the TPM refuses.
    """
    message, signature, values = (directory / name for name in ("message", "signature", "values"))
    tools.run(
        *("tpm2_quote", "-Q", "-c", key, "-l", f"{BANK}:{','.join(map(str, PCRS))}", "-g", "sha256"),
        *("-q", hashlib.sha256(report_data).hexdigest()),
        *("-m", message, "-s", signature, "-o", values, "-F", "values"),
    )
    return _read(message), {"signature": _read(signature), "pcrs": _pcrs(_read(values))}


class VtpmCounter:
    """A counter in the TPM's own memory. One that is deleted and made again goes on above where it was."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def read(self) -> int:
        """Return the count; the counter is made at its first use. Raises AttestationError where the TPM refuses."""
        with self._tools.work():
            self._make()
            return self._value()

    def used(self) -> bool:
        """Return whether the counter is there; raises AttestationError where the TPM does not say."""
        with self._tools.work():
            return self._tools.has("handles-nv-index", _COUNTER_HANDLE)

    def increment(self) -> int:
        """Add one and return the count. Raises AttestationError where the TPM refuses."""
        with self._tools.work():
            self._make()
            self._tools.run("tpm2_nvincrement", "-Q", "-C", "o", _COUNTER_HANDLE)
            return self._value()

    def _value(self) -> int:
        data = self._tools.run("tpm2_nvread", "-C", "o", "-s", "8", _COUNTER_HANDLE)
        if len(data) != 8:
            raise AttestationError("the TPM's counter has a wrong length", got=f"{len(data)} bytes", expected="8 bytes")
        return int.from_bytes(data, "big")

    def _make(self) -> None:
        if not self._tools.has("handles-nv-index", _COUNTER_HANDLE):
            attributes = "nt=counter|ownerread|ownerwrite"
            self._tools.run("tpm2_nvdefine", "-Q", "-C", "o", "-s", "8", "-a", attributes, _COUNTER_HANDLE)
        found = _NV_ATTRIBUTES.search(self._tools.run("tpm2_nvreadpublic", _COUNTER_HANDLE) + b"\n")
        attributes_set = int(found[1], 16) if found else 0
        # In its place somebody may have put memory that takes any value.
        if (attributes_set >> 4) & 0xF != 1:
            raise AttestationError("not a counter in the TPM", where=f"NV index {_COUNTER_HANDLE}")
        if not attributes_set & _NV_WRITTEN:  # a counter has no value before its first step
            self._tools.run("tpm2_nvincrement", "-Q", "-C", "o", _COUNTER_HANDLE)


def _read(path: Path) -> bytes:
    return read_small(path, _MAX_FILE_BYTES, "output of a TPM program")


def _pcrs(values: bytes) -> bytes:
    """Return the canonical JSON ``{bank: {index: hex}}`` of PCR values one after another."""
    if len(values) != _DIGEST_BYTES * len(PCRS):
        raise AttestationError("PCR values of a wrong length", got=f"{len(values)} bytes")
    digests = [values[start : start + _DIGEST_BYTES].hex() for start in range(0, len(values), _DIGEST_BYTES)]
    return encode({BANK: dict(zip(map(str, PCRS), digests, strict=True))})
