"""Intel's collateral for a quote: fetched where somebody asks for it, from a service that he names, and its dates.

It is Intel's word on which platforms are good, signed by Intel, and good for a month. Judging never fetches it: only
``obfuscatune attest collateral fetch`` does. It is verified when evidence is judged; the service can only withhold it,
or give an older one. It learns the platform's model (FMSPC).
"""

import asyncio
import json
import re
from typing import Any

import dcap_qvl

from obfuscatune.errors import ObfuscatuneError, UsageError, printable
from obfuscatune.parties.attestation.collateral_dates import COLLATERAL, expiry

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
