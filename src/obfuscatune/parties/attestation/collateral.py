"""Intel's collateral for a quote: fetched where somebody asks for it, from a service that he names, and its dates.

It is Intel's word on which platforms are good, signed by Intel, and good for a month. Judging never fetches it: only
``obfuscatune attest collateral fetch`` does. It is verified when evidence is judged; the service can only withhold it,
or give an older one. It learns the platform's model (FMSPC).
"""

import asyncio
import json
import re
from datetime import UTC, datetime
from typing import Any

import dcap_qvl
from cryptography import x509

from obfuscatune.errors import FormatError, ObfuscatuneError, UsageError, printable
from obfuscatune.parties.attestation.dcap import COLLATERAL
from obfuscatune.parties.attestation.fields import parsing
from obfuscatune.parties.attestation.policy import MAX_COLLATERAL_BYTES

_URL = re.compile(r"https?://[A-Za-z0-9._:\[\]-]{1,255}(/[A-Za-z0-9._~/-]{0,255})?")
_MAX_MESSAGE = 200


def fetch(url: str, quote: bytes, timeout: float) -> bytes:
    """Return the collateral of a quote's platform from a PCS or PCCS, in the JSON of dcap-qvl; not verified.

    Args:
        url: of the service, without the path of its interface. quote: of a TD or SGX enclave. timeout: seconds.

    Raises:
        UsageError: no such URL. ObfuscatuneError: nobody answers, or not with collateral.
    """
    if not _URL.fullmatch(url):
        raise UsageError("not a URL of a collateral service", got=repr(url), expected="https://HOST[:PORT][/PATH]")

    async def ask() -> Any:
        return await asyncio.wait_for(dcap_qvl.get_collateral(url, quote), timeout)

    problem = ""
    try:
        fields = json.loads(asyncio.run(ask()).to_json())
        text = json.dumps({name: fields[name] for name in sorted(COLLATERAL)}).encode()
        expiry(text)
    except TimeoutError:
        problem = f"no answer within {timeout:g} s"
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        problem = printable(error, most=_MAX_MESSAGE)
    if problem:
        raise ObfuscatuneError("cannot fetch collateral", got=problem, where=url)
    return text


def expiry(text: bytes) -> dict[str, datetime]:
    """Return until when each part of collateral is good, by name; raises FormatError where it is none."""
    with parsing("collateral"):
        fields = json.loads(text) if len(text) <= MAX_COLLATERAL_BYTES else {}
        if not isinstance(fields, dict) or not set(fields) >= COLLATERAL:
            raise FormatError("collateral is not JSON of dcap-qvl", expected="its nine fields")
        ends = {}
        for name in ("tcb_info", "qe_identity"):
            ends[name] = datetime.fromisoformat(json.loads(fields[name])["nextUpdate"]).astimezone(UTC)
        for name in ("root_ca_crl", "pck_crl"):
            end = x509.load_der_x509_crl(bytes.fromhex(fields[name])).next_update_utc
            if end is None:
                raise FormatError("collateral's revocation list has no end")
            ends[name] = end
    return ends
