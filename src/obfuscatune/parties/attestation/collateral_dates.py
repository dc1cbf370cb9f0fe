"""What Intel's collateral consists of, and until when each part of it is good. Nothing of it is verified here."""

import json
from datetime import UTC, datetime

from cryptography import x509

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation.fields import parsing
from obfuscatune.parties.attestation.policy import MAX_COLLATERAL_BYTES

_CHAINS = {"pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain"}
_SIGNATURES = {"tcb_info_signature", "qe_identity_signature"}
COLLATERAL = _CHAINS | _SIGNATURES | {"root_ca_crl", "pck_crl", "tcb_info", "qe_identity"}


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
