"""Fetching collateral from a service on this machine that has Intel's real answers, and their dates."""

import contextlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from obfuscatune.cli import main
from obfuscatune.errors import FormatError, ObfuscatuneError, UsageError
from obfuscatune.parties.attestation.collateral import fetch
from obfuscatune.parties.attestation.collateral_dates import expiry
from obfuscatune.parties.attestation.evidence import Evidence, Quote
from obfuscatune.parties.attestation.verify import judge_quote

from .enclaves import claims
from .samples import TDX_POLICY, TDX_TIME, failed, load, needs_samples

pytestmark = needs_samples
QUOTE, SAMPLE = "dcap/tdx_quote", "dcap/tdx_quote_collateral.json"


@contextlib.contextmanager
def service(**changes: str) -> Iterator[str]:
    """A PCCS with the sample's collateral, and its URL."""
    fields = {**json.loads(load(SAMPLE)), **changes}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urllib.parse.urlparse(self.path).path
            bodies = {
                "pckcrl": (bytes.fromhex(fields["pck_crl"]), "SGX-PCK-CRL", "pck_crl"),
                "rootcacrl": (fields["root_ca_crl"].encode(), "", ""),
                "tcb": (signed("tcbInfo", "tcb_info"), "TCB-Info", "tcb_info"),
                "identity": (signed("enclaveIdentity", "qe_identity"), "SGX-Enclave-Identity", "qe_identity"),
            }
            body, header, name = bodies[path.rpartition("/")[2]]
            self.send_response(200)
            if header:
                chain = urllib.parse.quote(fields[f"{name}_issuer_chain"])
                self.send_header(f"{header}-Issuer-Chain", chain)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    def signed(key: str, name: str) -> bytes:
        return f'{{"{key}":{fields[name]},"signature":"{fields[f"{name}_signature"]}"}}'.encode()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(20)


def test_what_is_fetched_verifies_the_quote() -> None:
    with service() as url:
        text = fetch(url, load(QUOTE), 20)
    assert json.loads(text) == json.loads(load(SAMPLE))
    found = judge_quote(Quote("tdx", load(QUOTE), {"collateral": text}), TDX_POLICY, now=TDX_TIME)
    assert not found.failed, str(found)
    later = judge_quote(Quote("tdx", load(QUOTE), {"collateral": text}), TDX_POLICY, now=TDX_TIME + 40 * 86_400)
    assert failed(later) == ["collateral"]
    assert "expired 2025-07-19" in str(later) and "fetch it again: obfuscatune attest collateral fetch" in str(later)


def test_it_is_fetched_for_a_quote_of_version_5_too() -> None:
    with service() as url:
        assert json.loads(fetch(url, load("tdx/quote_v5_sample.dat"), 20)) == json.loads(load(SAMPLE))


def test_services_that_give_none() -> None:
    with service(tcb_info='{"nextUpdate": 7}') as url, pytest.raises(ObfuscatuneError):
        fetch(url, load(QUOTE), 20)
    with pytest.raises(ObfuscatuneError, match="cannot fetch collateral"):
        fetch(url, load(QUOTE), 20)  # nobody listens there any more
    for wrong in ("", "file:///etc/passwd", "https://", "ftp://host", "https://host/?x=1", "https://h\n"):
        with pytest.raises(UsageError, match="not a URL"):
            fetch(wrong, load(QUOTE), 1)


def test_dates() -> None:
    ends = expiry(load(SAMPLE))
    assert f"{min(ends.values()):%Y-%m-%d}" == "2025-07-19" and len(ends) == 4
    fields = json.loads(load(SAMPLE))
    for text in (b"", b"{}", b"\xff", b"[" * 9999, json.dumps({**fields, "pck_crl": "00"}).encode()):
        with pytest.raises(FormatError):
            expiry(text)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quote, output = tmp_path / "quote", tmp_path / "collateral.json"
    quote.write_bytes(load(QUOTE))
    with service() as url:
        command = ["attest", "collateral", "fetch", url, "--quote", str(quote), "--output", str(output)]
        assert main(command) == 1
        out = capsys.readouterr().out
        assert "good until 2025-07-19" in out and "EXPIRED: fetch it again" in out
        assert json.loads(output.read_bytes()) == json.loads(load(SAMPLE))
        assert main(command) == 2  # nothing is overwritten
        # Evidence of an Azure machine: its quote is beside the paravisor's report.
        azure = Evidence(Quote("azure", b"HCL report", {"td_quote": load(QUOTE)}), claims().to_dict())
        quote.write_bytes(azure.to_bytes())
        other = tmp_path / "other.json"
        assert main([*command[:-1], str(other)]) == 1
        assert other.read_bytes() == output.read_bytes()
        capsys.readouterr()
    assert main(["attest", "collateral", "show", str(output)]) == 1
    assert "all of it is good until 2025-07-19" in capsys.readouterr().out
