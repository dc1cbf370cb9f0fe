"""configfs-tsm against a kernel made of dictionaries, which commits a write at close as the real one does."""

import errno
import os
import struct
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import AttestationError
from obfuscatune.parties.attestation import configfs
from obfuscatune.parties.attestation.configfs import ConfigfsAttester, ConfigfsPlatform
from obfuscatune.parties.attestation.evidence import MAX_QUOTE_BYTES
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.attestation.snp_certificates import MAX_TABLE_BYTES, certificate_chain

REPORT_DATA = bytes(range(64))
ROOT = Path("/sys/kernel/config/tsm/report")
SHARED = Path(__file__).parents[3] / ".." / "shared" / "attestation"
VCEK, VLEK, ASK, ARK = (
    uuid.UUID(text).bytes
    for text in (
        "63da758d-e664-4564-adc5-f4b93be8accd",
        "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
        "4ab7b379-bbac-4fe4-a02f-05aef327c782",
        "c0b406a4-a803-4952-9743-3fb6014cd0ae",
    )
)


def tdx_quote(report_data: bytes) -> bytes:
    return b"\4\0\0\0\x81".ljust(48 + 520, b"\0") + report_data


def snp_report(report_data: bytes, flags: int = 0) -> bytes:
    return bytes(0x48) + struct.pack("<II", flags, 0) + report_data + bytes(0x4A0 - 0x90)


class Kernel:
    """Directories of attributes; the quote is made when ``outblob`` is read, of what ``inblob`` then holds."""

    def __init__(
        self,
        provider: bytes = b"tdx_guest\n",
        make: Callable[[bytes], bytes] = tdx_quote,
        auxiliary: bytes = b"",
        part: int = 1 << 20,
    ) -> None:
        self.provider, self.make, self.auxiliary, self.part = provider, make, auxiliary, part
        self.entries: dict[str, dict[str, bytes]] = {}
        self.generation: dict[str, int] = {}
        self.handles: dict[int, tuple[str, str, bytearray]] = {}
        self.made: list[str] = []
        self.before_outblob: Callable[[str], None] = lambda entry: None
        self.drop_writes = False

    def mkdir(self, path: str, /) -> None:
        assert Path(path).parent == ROOT
        assert path not in self.made
        self.made.append(path)
        self.entries[path], self.generation[path] = {}, 0

    def rmdir(self, path: str, /) -> None:
        assert not self.handles, "a file was left open"
        del self.entries[path]

    def open(self, path: str, flags: int, /) -> int:
        entry, name = os.path.split(path)
        data = b"" if name == "inblob" else self.attribute(entry, name)
        handle = len(self.handles) + 1
        self.handles[handle] = (entry, name, bytearray(data))
        return handle

    def attribute(self, entry: str, name: str) -> bytes:
        if name == "provider":
            return self.provider
        if name == "generation":
            return b"%d\n" % self.generation[entry]
        if name == "auxblob":
            return self.auxiliary
        if name != "outblob" or "inblob" not in self.entries[entry]:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.before_outblob(entry)
        return self.make(self.entries[entry]["inblob"])

    def read(self, handle: int, count: int, /) -> bytes:
        data = self.handles[handle][2]
        count = min(count, self.part)
        part = bytes(data[:count])
        del data[:count]
        return part

    def write(self, handle: int, data: bytes, /) -> int:
        self.handles[handle][2].extend(data)
        return len(data)

    def close(self, handle: int, /) -> None:
        entry, name, data = self.handles.pop(handle)
        if name == "inblob" and not self.drop_writes:
            self.overwrite(entry, bytes(data))

    def overwrite(self, entry: str, data: bytes) -> None:
        self.entries[entry]["inblob"] = data
        self.generation[entry] += 1


def attester(kernel: Kernel, event_log: Path = Path("/nonexistent")) -> ConfigfsAttester:
    return ConfigfsAttester(ROOT, event_log, kernel)


def table(*entries: tuple[bytes, bytes], end: bytes = bytes(24)) -> bytes:
    at, head, body = 24 * (len(entries) + 1), b"", b""
    for guid, data in entries:
        head += struct.pack("<16sII", guid, at + len(body), len(data))
        body += data
    return head + end + body


def certificate(content: bytes) -> bytes:
    return b"\x30\x82" + len(content).to_bytes(2, "big") + content


@pytest.mark.parametrize("part", [1 << 20, 1, 7])
def test_a_tdx_quote(part: int) -> None:
    kernel = Kernel(part=part)
    quote = attester(kernel).quote(REPORT_DATA)
    assert (quote.kind, quote.quote, quote.extras) == ("tdx", tdx_quote(REPORT_DATA), {})
    assert len(kernel.made) == 1
    assert not kernel.entries


def test_each_quote_has_a_directory_of_its_own() -> None:
    kernel = Kernel()
    for _ in range(3):
        attester(kernel).quote(REPORT_DATA)
    assert len(set(kernel.made)) == 3


def test_an_snp_report_comes_with_its_certificates() -> None:
    leaf, ask, ark = (certificate(bytes([number]) * 300) for number in range(3))
    kernel = Kernel(b"sev_guest\n", snp_report, table((ARK, ark), (VCEK, leaf + bytes(20)), (ASK, ask)))
    quote = attester(kernel).quote(REPORT_DATA)
    assert quote.kind == "snp"
    assert quote.extras["certificates"] == certificate_chain(kernel.auxiliary, quote.quote)
    blocks = quote.extras["certificates"].decode().split("-----END CERTIFICATE-----\n")
    assert len(blocks) == 4


def test_an_snp_host_may_hand_over_no_certificates() -> None:
    assert attester(Kernel(b"sev_guest\n", snp_report)).quote(REPORT_DATA).extras == {}


def test_the_chain_of_a_simulated_platform_survives_the_table(tmp_path: Path) -> None:
    simulated = SimulatedPlatform.create(tmp_path / "snp", "snp").attester.quote(REPORT_DATA)
    chain = x509.load_pem_x509_certificates(simulated.extras["certificates"])
    ders = [each.public_bytes(Encoding.DER) for each in chain]
    kernel = Kernel(b"sev_guest", lambda data: simulated.quote, table(*zip((VCEK, ASK, ARK), ders, strict=True)))
    assert attester(kernel).quote(REPORT_DATA) == simulated


def test_a_disturbed_report_is_made_again_and_given_up_after_some_attempts() -> None:
    kernel = Kernel()
    disturbances = iter(range(configfs.ATTEMPTS - 1))

    def disturb(entry: str) -> None:
        if next(disturbances, None) is not None:
            kernel.overwrite(entry, bytes(64))

    kernel.before_outblob = disturb
    assert attester(kernel).quote(REPORT_DATA).quote == tdx_quote(REPORT_DATA)
    kernel.before_outblob = lambda entry: kernel.overwrite(entry, bytes(64))
    with pytest.raises(AttestationError, match="changed while it was made"):
        attester(kernel).quote(REPORT_DATA)
    assert not kernel.entries


def test_a_write_that_the_kernel_dropped_gives_no_quote() -> None:
    kernel = Kernel()
    kernel.drop_writes = True
    with pytest.raises(AttestationError):
        attester(kernel).quote(REPORT_DATA)
    assert not kernel.entries


@pytest.mark.parametrize(("number", "attempts"), [(errno.EWOULDBLOCK, 4), (errno.EBUSY, 4), (errno.EIO, 1)])
def test_faults_of_the_kernel(number: int, attempts: int) -> None:
    kernel = Kernel()
    seen: list[str] = []

    def fail(entry: str) -> None:
        seen.append(entry)
        raise OSError(number, os.strerror(number))

    kernel.before_outblob = fail
    with pytest.raises(AttestationError, match="configfs-tsm"):
        attester(kernel).quote(REPORT_DATA)
    assert len(seen) == attempts
    assert not kernel.entries


def test_a_quote_over_other_data_is_refused() -> None:
    with pytest.raises(AttestationError, match="other report data"):
        attester(Kernel(make=lambda data: tdx_quote(bytes(64)))).quote(REPORT_DATA)


@pytest.mark.parametrize("size", [48 + 583, MAX_QUOTE_BYTES + 1, 10 * MAX_QUOTE_BYTES])
def test_a_quote_of_an_impossible_length_is_refused(size: int) -> None:
    kernel = Kernel(make=lambda data: tdx_quote(data).ljust(size, b"\0")[:size])
    with pytest.raises(AttestationError, match=r"length|too long|cut"):
        attester(kernel).quote(REPORT_DATA)
    assert not kernel.entries


def test_a_provider_that_is_not_known_is_refused() -> None:
    for provider in (b"arm_cca_guest\n", b"", b"tdx_guest" * 10, b"\x1b[2J\xff"):
        with pytest.raises(AttestationError) as caught:
            attester(Kernel(provider)).quote(REPORT_DATA)
        assert "\x1b" not in str(caught.value)


def test_a_machine_that_is_no_guest_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(AttestationError, match=r"TDX or SEV-SNP guest with Linux 6\.7"):
        ConfigfsAttester(tmp_path / "missing").quote(REPORT_DATA)


def test_report_data_have_one_length() -> None:
    kernel = Kernel()
    with pytest.raises(AttestationError, match="report data"):
        attester(kernel).quote(bytes(63))
    assert not kernel.made


def test_the_event_log_comes_without_the_unused_end_of_its_area(tmp_path: Path) -> None:
    path = tmp_path / "CCEL"
    path.write_bytes(b"log" * 100 + b"\xff" * 1000)
    assert attester(Kernel(), path).quote(REPORT_DATA).extras == {"event_log": b"log" * 100}
    assert attester(Kernel(b"sev_guest", snp_report), path).quote(REPORT_DATA).extras == {}


def test_a_real_event_log_fits(tmp_path: Path) -> None:
    path = SHARED / "ccel" / "ccel_data.dat"
    if not path.exists():
        pytest.skip("no ../shared/attestation")
    assert len(attester(Kernel(), path).quote(REPORT_DATA).extras["event_log"]) == 18_101


def test_event_logs_beyond_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "CCEL"
    path.write_bytes(b"x" * (configfs.MAX_LOG_BYTES + 1))
    assert attester(Kernel(), path).quote(REPORT_DATA).extras == {}
    path.write_bytes(b"\xff" * (configfs.MAX_LOG_AREA_BYTES + 1))
    with pytest.raises(AttestationError, match="event log is too long"):
        attester(Kernel(), path).quote(REPORT_DATA)


def test_the_platform_has_neither_counter_nor_a_sealing_key_without_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configfs, "DEVICE", Path("/nonexistent"))
    platform = ConfigfsPlatform()
    assert (platform.simulated, platform.counter, platform.sealing_key()) == (False, None, None)


def test_the_key_that_signed_leads_the_chain() -> None:
    vcek, vlek = (VCEK, certificate(b"c" * 200)), (VLEK, certificate(b"l" * 200))
    by_vcek, by_vlek = (snp_report(REPORT_DATA, flags) for flags in (0, 1 << 2))
    both = table(vcek, vlek)
    assert certificate_chain(both, by_vcek) == certificate_chain(table(vcek), by_vcek) != b""
    assert certificate_chain(both, by_vlek) == certificate_chain(table(vlek), by_vlek) != b""
    assert certificate_chain(both, by_vcek) != certificate_chain(both, by_vlek)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(MAX_TABLE_BYTES + 1), "at most"),
        (bytes(23), "no end"),
        (struct.pack("<16sII", VCEK, 0, 0), "no end"),
        (struct.pack("<16sII", VCEK, 0, 0) + bytes(23), "no end"),
        (struct.pack("<16sII", VCEK, 48, 1) + bytes(24), "outside"),
        (struct.pack("<16sII", VCEK, 0xFFFFFFFF, 0xFFFFFFFF) + bytes(24), "outside"),
        (table((VCEK, b""), (VCEK, b"")), "twice"),
        (table((VCEK, b"")), "no certificate"),
        (table((VCEK, b"-----BEGIN CERTIFICATE-----")), "no certificate"),
        (table((VCEK, certificate(b"x" * 200)[:-1])), "no certificate"),
        (b"".join(struct.pack("<16sII", bytes([number] * 16), 0, 0) for number in range(1, 20)), "more than 16"),
    ],
)
def test_hostile_tables_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(AttestationError, match=message):
        certificate_chain(data, snp_report(REPORT_DATA))


def test_unknown_entries_are_let_pass() -> None:
    leaf = certificate(b"x" * 200)
    plain, more = table((VCEK, leaf)), table((b"u" * 16, b"whatever"), (VCEK, leaf))
    assert certificate_chain(more, bytes(0x4A0)) == certificate_chain(plain, bytes(0x4A0))


GUIDS = st.sampled_from([VCEK, VLEK, ASK, ARK, bytes(16), b"u" * 16])
NUMBERS = st.integers(0, 300) | st.integers(0, 0xFFFFFFFF)
ENTRIES = st.lists(st.builds(struct.Struct("<16sII").pack, GUIDS, NUMBERS, NUMBERS), max_size=20)
BODIES = st.binary(max_size=300).map(lambda data: certificate(data) if len(data) % 2 else data)


@given(st.builds(lambda head, body: b"".join(head) + body, ENTRIES, BODIES), st.binary(max_size=0x50))
def test_any_table_gives_pem_or_an_attestation_error(data: bytes, report: bytes) -> None:
    try:
        chain = certificate_chain(data, report)
    except AttestationError:
        return
    assert chain == b"" or chain.startswith(b"-----BEGIN CERTIFICATE-----\n")
    assert len(chain) <= 3 * 2 * len(data) + 300
