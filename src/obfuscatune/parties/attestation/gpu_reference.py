"""What a verifier accepts of a GPU: versions and measurements, in a file of their own that the policy names.

    driver = ["550.90.07"]
    vbios = ["96.00.9F.00.01"]
    [measurements]
    6 = ["c9e4fe66..."]       index of the block, from 1, to the SHA-384 that are allowed

It stands in place of NVIDIA's reference manifests (RIMs), two signed SWID files per version of driver and VBIOS, whose
index of a measurement counts from 0. Who writes the file answers for its values: no signature of a RIM is checked here.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation.gpu_report import DIGEST_BYTES, GpuReport
from obfuscatune.parties.attestation.tables import Table

MAX_REFERENCE_BYTES = 64 * 1024
MAX_BLOCKS = 255
_VERSION = re.compile(r"[0-9A-Za-z.]{1,31}")


@dataclass(frozen=True)
class GpuReference:
    """Allowed versions, and allowed values by the index of the block, hex. Blocks that it does not name pass."""

    driver: tuple[str, ...]
    vbios: tuple[str, ...]
    measurements: Mapping[int, frozenset[str]]


def read_reference(text: str) -> GpuReference:
    """Return the reference of a file's text.

    Raises:
        FormatError: no TOML, or anything in it unknown, of a wrong type or missing: all faults at once.
    """
    try:
        fields = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError("reference of a GPU is not TOML", got=str(error)) from None
    faults: list[str] = []
    file = Table(fields, "", faults)
    driver, vbios = (file.words(name, _VERSION, ()) for name in ("driver", "vbios"))
    blocks = file.table("measurements")
    values = {
        index: blocks.hexes(str(index), DIGEST_BYTES) for index in range(1, MAX_BLOCKS + 1) if str(index) in blocks
    }
    for table in (blocks, file):
        table.end()
    wanting = {"driver": driver, "vbios": vbios, "measurements": values and all(values.values())}
    faults = faults or [f"{name}: allows nothing" for name, allowed in wanting.items() if not allowed]
    if faults:
        raise FormatError(f"reference of a GPU is refused: {'; '.join(faults)}")
    return GpuReference(driver, vbios, values)


def write_reference(report: GpuReport) -> str:
    """Return the text of a reference that accepts what this report says: versions, and every block but the zeros."""
    lines = [f'driver = ["{report.driver}"]', f'vbios = ["{report.vbios}"]', "[measurements]"]
    lines += [f'{index} = ["{value.hex()}"]' for index, value in report.measurements.items() if any(value)]
    return "\n".join(lines)
