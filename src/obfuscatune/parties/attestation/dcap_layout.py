"""Where a DCAP quote has its body: by the quote's version, and in version 5 by the type and size before the body.

    versions 3, 4    header (48) | body
    version 5        header (48) | type (u16) | size (u32) | body

Formats: Intel SGX ECDSA Quote Library API, appendix A (v3); Intel TDX DCAP Quoting Library API, appendix A.3 (v4, v5).
"""

from dataclasses import dataclass

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation.fields import Fields

HEADER_BYTES = 48
TEE_TYPES = {"sgx": 0x00, "tdx": 0x81}
SGX_BODY_BYTES, TD_10_BODY_BYTES, TD_15_BODY_BYTES = 384, 584, 648
# Of version 5: type of the body to kind and size.
_BODIES = {1: ("sgx", SGX_BODY_BYTES), 2: ("tdx", TD_10_BODY_BYTES), 3: ("tdx", TD_15_BODY_BYTES)}
# In the body, the same in all types of one kind.
REPORT_DATA_AT = {"sgx": 320, "tdx": 520}
MEASUREMENTS_AT = {
    "sgx": {"mrenclave": (64, 32), "mrsigner": (128, 32)},
    "tdx": {
        "mrtd": (136, 48),
        **{f"rtmr{number}": (328 + 48 * number, 48) for number in range(4)},
        **{"mrseam": (16, 48), "mrconfigid": (184, 48), "mrowner": (232, 48), "mrownerconfig": (280, 48)},
    },
}
_SERVICE_TD = (600, 48)  # of a TD 1.5 body


@dataclass(frozen=True)
class Body:
    """A quote's body: where it begins, its bytes, and of what kind it is. Nothing of it is verified."""

    at: int
    data: bytes
    kind: str

    @property
    def report_data(self) -> bytes:
        """The 64 bytes of the attester's choice."""
        at = REPORT_DATA_AT[self.kind]
        return self.data[at : at + 64]

    @property
    def measurements(self) -> dict[str, str]:
        """Measurements by the names of a policy, hex; ``mrservicetd`` where the body has one."""
        places = dict(MEASUREMENTS_AT[self.kind])
        if len(self.data) == TD_15_BODY_BYTES:
            places["mrservicetd"] = _SERVICE_TD
        return {name: self.data[at : at + size].hex() for name, (at, size) in places.items()}


def body_of(raw: bytes, kind: str) -> Body:
    """Return the body of a quote.

    Raises:
        FormatError: another version or kind, an unknown type of body, or a size that does not fit it.
    """
    version, tee = int.from_bytes(raw[0:2], "little"), int.from_bytes(raw[4:8], "little")
    if version not in (3, 4, 5) or tee != TEE_TYPES.get(kind):
        raise FormatError(f"not a DCAP quote of {kind}", got=f"version {version}, TEE type {tee:#x}")
    reader = Fields(raw, "quote", HEADER_BYTES)
    size = SGX_BODY_BYTES if kind == "sgx" else TD_10_BODY_BYTES
    if version == 5:
        body_type, told = reader.number(2), reader.number(4)
        of, size = _BODIES.get(body_type, ("", 0))
        if of != kind or told != size:
            got = f"type {body_type} of {told} bytes"
            raise FormatError(f"body of a {kind} quote of an unknown type", got=got, expected="types 1, 2 and 3")
    at = reader.at
    return Body(at, reader.take(size), kind)
