"""TPM 2.0: a quote over PCRs by an attestation key that the policy names, verified here on `cryptography`.

    signature = Sign(attestation key, TPMS_ATTEST)      qualifying data = SHA-256(report data)
    PCR digest of the TPMS_ATTEST = H(value of each selected PCR, in the order of the selection)

where H is the signature's hash. No root vouches for the key: the verifier must know from elsewhere (the cloud's
certificate of it, an enrolment with the TPM's endorsement key) that it is a restricted key of a genuine TPM, in a
machine that measures what it boots. An ordinary key, once it is pinned, can sign any quote at all.
"""

import contextlib
import hashlib
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS, PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation.evidence import Quote
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.tpm_structures import (
    DIGEST_BYTES,
    Bank,
    TpmQuote,
    TpmSignature,
    parse_quote,
    parse_signature,
)
from obfuscatune.parties.attestation.verdict import Checked, Rule
from obfuscatune.parties.canonical import decode

Key = rsa.RSAPublicKey | ec.EllipticCurvePublicKey
_EXTRAS = {"signature", "key", "pcrs"}
_HASHES: dict[Bank, type[hashes.HashAlgorithm]] = {
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}
_MAX_KEY_BYTES = 2048
_RSA_BITS = range(2048, 4097)
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_MAX_PCR_BYTES = 16 * 1024


def check(quote: Quote, policy: Policy, now: float) -> Checked:
    """Verify a quote by its signature, its key by the policy, and the PCR values beside it by the quote's digest.

    ``now`` changes nothing: neither the key nor the quote has a date.

    Raises:
        FormatError: quote, signature, key or PCR values break their format.
    """
    if set(quote.extras) != _EXTRAS:
        raise FormatError("what comes with a TPM quote", expected=", ".join(sorted(_EXTRAS)))
    attested, signature = parse_quote(quote.quote), parse_signature(quote.extras["signature"])
    key, fingerprint = _read_key(quote.extras["key"])
    values = read_pcrs(quote.extras["pcrs"], attested)
    simulation = policy.allow_simulation and fingerprint in policy.simulation_tpm_keys
    expected = "a key of the policy" + (", or one for simulation" if policy.allow_simulation else "")
    rules = [
        Rule("key", fingerprint in policy.tpm_keys or simulation, fingerprint, expected),
        genuine("signature", verifies(key, signature, quote.quote), "not by this key"),
        genuine("pcrs", pcr_digest(values, signature.hash) == attested.pcr_digest, "not the quoted values"),
    ]
    if not all(rule.passed for rule in rules):
        return Checked(rules)
    return Checked(rules, attested.extra_data, measurements(values), simulation)


def binds(report_data: bytes) -> bytes:
    """Return the qualifying data for ``report_data``: its SHA-256, because a TPM takes no more than one hash."""
    return hashlib.sha256(report_data).digest()


def measurements(values: Mapping[tuple[Bank, int], bytes]) -> dict[str, str]:
    """Return the PCRs of the SHA-256 bank by the names of a policy, hex."""
    return {f"pcr{index}": value.hex() for (bank, index), value in values.items() if bank == "sha256"}


def genuine(name: str, passed: bool, otherwise: str) -> Rule:
    """Return the rule of something that is genuine, or ``otherwise``."""
    return Rule(name, passed, "genuine" if passed else otherwise, "genuine")


def _read_key(pem: bytes) -> tuple[Key, str]:
    """Return the key and SHA-256 of its SubjectPublicKeyInfo, hex; only the one usual spelling of the PEM is taken."""
    with contextlib.suppress(ValueError, UnsupportedAlgorithm):
        key = load_pem_public_key(pem[:_MAX_KEY_BYTES])
        if (isinstance(key, rsa.RSAPublicKey) and key.key_size in _RSA_BITS) or (
            isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES)
        ):
            info = PublicFormat.SubjectPublicKeyInfo
            if key.public_bytes(Encoding.PEM, info) == pem:
                return key, hashlib.sha256(key.public_bytes(Encoding.DER, info)).hexdigest()
    raise FormatError("attestation key of a TPM", expected="PEM of RSA (2048 to 4096 bits) or P-256, P-384, P-521")


def read_pcrs(data: bytes, quote: TpmQuote) -> dict[tuple[Bank, int], bytes]:
    """Return the values of the quoted PCRs, in the quote's order, from the canonical JSON {bank: {index: hex}}."""
    fields = decode(data, "PCR values", max_bytes=_MAX_PCR_BYTES)
    found: dict[tuple[Bank, int], bytes] = {}
    for bank, index in quote.selection:
        values = fields.get(bank)
        text = values.get(str(index)) if isinstance(values, dict) else None
        try:
            value = bytes.fromhex(text) if isinstance(text, str) else b""
        except ValueError:
            value = b""
        if len(value) != DIGEST_BYTES[bank] or value.hex() != text:
            raise FormatError("value of a quoted PCR", where=f"{bank}:{index}", expected=f"{DIGEST_BYTES[bank]} bytes")
        found[bank, index] = value
    if sum(len(values) if isinstance(values, dict) else 1 for values in fields.values()) != len(found):
        raise FormatError("PCR values that the quote does not cover")
    return found


def pcr_digest(values: Mapping[tuple[Bank, int], bytes], bank: Bank) -> bytes:
    """Return the digest of PCR values in a quote's order."""
    return hashlib.new(bank, b"".join(values.values())).digest()


def verifies(key: Key, signature: TpmSignature, message: bytes) -> bool:
    """Return whether a TPM's key has signed a message."""
    algorithm = _HASHES[signature.hash]()
    try:
        if isinstance(key, rsa.RSAPublicKey) and signature.scheme != "ecdsa":
            # A TPM salts with as many bytes as fit, or as FIPS wants; verification finds out.
            padding = PKCS1v15() if signature.scheme == "rsassa" else PSS(MGF1(algorithm), PSS.AUTO)
            key.verify(signature.numbers[0], message, padding, algorithm)
        elif isinstance(key, ec.EllipticCurvePublicKey) and signature.scheme == "ecdsa":
            r, s = (int.from_bytes(number, "big") for number in signature.numbers)
            key.verify(encode_dss_signature(r, s), message, ec.ECDSA(algorithm))
        else:
            return False
    except InvalidSignature:
        return False
    return True
