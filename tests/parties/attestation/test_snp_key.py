"""The derived key of an SEV-SNP guest, with an ioctl that plays the kernel."""

import ctypes
import errno
import struct
from pathlib import Path

import pytest

from obfuscatune.errors import AttestationError
from obfuscatune.parties.attestation.snp_key import SNP_GET_DERIVED_KEY, derived_key

KEY = bytes(range(32, 64))


class Processor:
    """Answers a request at the addresses that it names."""

    def __init__(self, key: bytes = KEY, status: int = 0, firmware: int = 0) -> None:
        self.key, self.status, self.firmware = key, status, firmware
        self.requests: list[bytes] = []
        self.commands: list[int] = []

    def __call__(self, handle: int, command: int, request: bytearray) -> int:
        version, key_request, response, _ = struct.unpack("<B7xQQQ", request)
        assert (handle >= 0, version, len(request)) == (True, 1, 32)
        self.commands.append(command)
        self.requests.append(ctypes.string_at(key_request, 32))
        ctypes.memmove(response, struct.pack("<I28x32s", self.status, self.key), 64)
        request[24:] = struct.pack("<Q", self.firmware)
        return 0


@pytest.fixture
def device(tmp_path: Path) -> Path:
    (tmp_path / "sev-guest").touch()
    return tmp_path / "sev-guest"


def test_the_request_is_the_kernels(device: Path) -> None:
    processor = Processor()
    derived_key(device, processor)
    # _IOWR(type 'S', number 1, 32 bytes): direction 3, size, type, number
    assert processor.commands == [3 << 30 | 32 << 16 | ord("S") << 8 | 1] == [SNP_GET_DERIVED_KEY]
    # Root: VCEK; mixed in: guest policy (bit 0) and measurement (bit 3); VMPL, SVN and TCB: zero.
    assert processor.requests == [struct.pack("<IIQIIQ", 0, 0, 0b1001, 0, 0, 0)]


def test_the_key_follows_the_processors(device: Path) -> None:
    first, again, other = (derived_key(device, Processor(key)) for key in (KEY, KEY, bytes(31) + b"\1"))
    assert first == again != other
    assert (len(first), first == KEY) == (32, False)


@pytest.mark.parametrize("processor", [Processor(status=0x16), Processor(firmware=2 << 32), Processor(bytes(32))])
def test_a_refusal_is_no_key(device: Path, processor: Processor) -> None:
    with pytest.raises(AttestationError, match="no derived key") as caught:
        derived_key(device, processor)
    assert KEY.hex() not in str(caught.value)


def test_faults_of_the_kernel(tmp_path: Path, device: Path) -> None:
    def fail(handle: int, command: int, request: bytearray) -> int:
        raise OSError(errno.EIO, "no answer")

    with pytest.raises(AttestationError, match="no answer"):
        derived_key(device, fail)
    with pytest.raises(AttestationError, match="No such file"):
        derived_key(tmp_path / "missing", Processor())
    with pytest.raises(AttestationError, match="Inappropriate ioctl"):
        derived_key(device)  # the real call, on a file that is no device
