"""Compute the measurements that a policy has to allow, from what was built and not from what a machine reports.

``python deploy/measure.py sgx FILE.sig`` reads MRENCLAVE and MRSIGNER from the SIGSTRUCT that gramine-sgx-sign wrote.
``python deploy/measure.py snp --firmware OVMF ...`` computes the SEV-SNP launch digest with the package sev-snp-measure
(extra ``measure``). Both print the ``[measurements]`` of a policy. For TDX ``obfuscatune attest measure``
replays an event log.

SIGSTRUCT (Intel SDM vol. 3D, table 38-21), 1808 bytes, little-endian: header [0:16], header 2 [24:40], RSA-3072 modulus
[128:512], exponent 3 [512:516], signature [516:900] over [0:128] || [900:1028] by PKCS #1 v1.5 with SHA-256, attribute
flags [928:936], their mask [944:952], MRENCLAVE [960:992], product [1024:1026], version [1026:1028]. MRSIGNER is the
SHA-256 of the modulus as it is stored.
"""

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from obfuscatune.errors import FormatError, UsageError
from obfuscatune.parties.identity import read_small

SIGSTRUCT_BYTES = 1808
MAX_FIRMWARE_BYTES = 64 << 20
_HEADER = bytes.fromhex("06000000e10000000000010000000000")
_HEADER2 = bytes.fromhex("01010000600000006000000001000000")
_DEBUG = 1 << 1


@dataclass(frozen=True)
class Sigstruct:
    """What a SIGSTRUCT says of an enclave: measurements (64 hex digits each), debug bit, product, security version."""

    mrenclave: str
    mrsigner: str
    debug: bool
    product: int
    version: int


def read_sigstruct(data: bytes, what: str) -> Sigstruct:
    """Return the fields of ``data``, whose signature is checked: a file that was changed measures nothing.

    Raises:
        FormatError: another length or header, another exponent than 3, or a signature that does not fit.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
    from cryptography.hazmat.primitives.hashes import SHA256

    if len(data) != SIGSTRUCT_BYTES:
        raise FormatError(f"{what} is no SIGSTRUCT", got=f"{len(data)} bytes", expected=f"{SIGSTRUCT_BYTES}")
    if data[:16] != _HEADER or data[24:40] != _HEADER2:
        raise FormatError(f"{what} is no SIGSTRUCT", expected="its two fixed headers")
    modulus, exponent = data[128:512], int.from_bytes(data[512:516], "little")
    if exponent != 3:
        raise FormatError(f"{what} has another exponent", got=exponent, expected=3)
    problem: FormatError | None = None
    try:
        key = RSAPublicNumbers(exponent, int.from_bytes(modulus, "little")).public_key()
        key.verify(data[516:900][::-1], data[:128] + data[900:1028], PKCS1v15(), SHA256())
    except (InvalidSignature, ValueError):
        problem = FormatError(f"{what} is not signed by the key in it", hint="sign the enclave again")
    if problem is not None:
        raise problem
    return Sigstruct(
        mrenclave=data[960:992].hex(),
        mrsigner=hashlib.sha256(modulus).hexdigest(),
        debug=bool(int.from_bytes(data[928:936], "little") & _DEBUG),
        product=int.from_bytes(data[1024:1026], "little"),
        version=int.from_bytes(data[1026:1028], "little"),
    )


def snp_launch_digest(
    firmware: Path, *, vcpus: int, vcpu_type: str, kernel: Path | None, initrd: Path | None, append: str, features: int
) -> str:
    """Return the launch digest (96 hex digits) of a machine that QEMU starts with ``kernel-hashes=on``.

    Args:
        firmware: image of an OVMF built for SEV-SNP ("AmdSev").
        vcpus: number of virtual processors: each one's start state is measured.
        vcpu_type: QEMU's name, for instance EPYC-v4; its signature is in that state.
        kernel: None where the firmware boots from the disk; then what it boots is NOT in the digest.
        initrd: with the kernel.
        append: the command line, without a newline at its end.
        features: SEV_FEATURES of the virtual processors: 1 is SNP alone; newer hosts may set more.

    Raises:
        UsageError: the package is missing, a file cannot be read, or the firmware has not the tables of SEV-SNP.
    """
    try:
        from sevsnpmeasure.guest import calc_launch_digest
        from sevsnpmeasure.sev_mode import SevMode
        from sevsnpmeasure.vcpu_types import CPU_SIGS
    except ModuleNotFoundError:
        hint = "pip install '.[measure]' in the source of obfuscatune"
        raise UsageError("the package sev-snp-measure is missing", hint=hint) from None
    if vcpu_type not in CPU_SIGS:
        raise UsageError("unknown type of processor", got=vcpu_type, expected=", ".join(CPU_SIGS))
    if not 1 <= vcpus <= 1024:
        raise UsageError("number of processors", got=vcpus, expected="1 to 1024")
    for path in filter(None, (firmware, kernel, initrd)):
        if not path.exists():
            raise UsageError("no such file", where=str(path))
    if firmware.stat().st_size > MAX_FIRMWARE_BYTES:
        raise UsageError("firmware is too large", expected=f"at most {MAX_FIRMWARE_BYTES} bytes", where=str(firmware))
    names = [str(path) if path else "" for path in (firmware, kernel, initrd)]
    try:
        digest: bytes = calc_launch_digest(SevMode.SEV_SNP, vcpus, CPU_SIGS[vcpu_type], *names, append, features)
    except Exception as error:  # the library has no class of its own
        hint = "it must be an OVMF built for SEV-SNP; with a kernel, one with kernel hashes"
        raise UsageError(
            "no launch digest for this firmware", got=type(error).__name__, where=names[0], hint=hint
        ) from None
    return digest.hex()


def main(arguments: list[str] | None = None) -> int:
    """Print the table of a policy; 2 for misuse."""
    parser = argparse.ArgumentParser(prog="measure.py", description=__doc__.splitlines()[0] if __doc__ else None)
    verbs = parser.add_subparsers(dest="verb", required=True)
    sgx = verbs.add_parser("sgx", help="MRENCLAVE and MRSIGNER of a SIGSTRUCT")
    sgx.add_argument("file", type=Path, help="obfuscatune.sig of gramine-sgx-sign")
    snp = verbs.add_parser("snp", help="launch digest of a SEV-SNP machine")
    snp.add_argument("--firmware", type=Path, required=True)
    snp.add_argument("--vcpus", type=int, required=True)
    snp.add_argument("--vcpu-type", required=True)
    snp.add_argument("--kernel", type=Path)
    snp.add_argument("--initrd", type=Path)
    snp.add_argument("--append-file", type=Path, help="file with the kernel's command line, and nothing else")
    snp.add_argument("--guest-features", type=lambda text: int(text, 0), default=1)
    options = parser.parse_args(arguments)
    try:
        print(_sgx_table(options.file) if options.verb == "sgx" else _snp_table(options))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _sgx_table(path: Path) -> str:
    found = read_sigstruct(read_small(path, SIGSTRUCT_BYTES, "SIGSTRUCT"), f"SIGSTRUCT {path}")
    if found.debug:
        raise UsageError("a debug enclave", where=str(path), hint="set sgx.debug = false; its memory can be read")
    return (
        f'[measurements]\nmrenclave = ["{found.mrenclave}"]\n'
        "# instead, to allow every enclave of this signer, product and version or a later one:\n"
        f'# mrsigner = ["{found.mrsigner}"]\n# isv_prod_id = [{found.product}]\n# isv_svn = {found.version}'
    )


def _snp_table(options: argparse.Namespace) -> str:
    append = options.append_file.read_text() if options.append_file else ""
    if append != append.strip():
        raise UsageError("white space around the command line", where=str(options.append_file))
    digest = snp_launch_digest(
        options.firmware,
        vcpus=options.vcpus,
        vcpu_type=options.vcpu_type,
        kernel=options.kernel,
        initrd=options.initrd,
        append=append,
        features=options.guest_features,
    )
    note = "" if options.kernel else "# firmware only: what it boots from the disk is not in this digest\n"
    return f'[measurements]\n{note}measurement = ["{digest}"]'


if __name__ == "__main__":
    sys.exit(main())
