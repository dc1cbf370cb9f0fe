"""A confidential machine of Azure as platform: its paravisor's report, and quotes of the TPM that the paravisor keeps.

The report is in the TPM's own memory, made when the machine started; it binds the TPM's attestation key, which is there
too. Under SEV-SNP the report is signed; the host hands out no certificates to the TPM's user, so a verifier names them
in the policy. Under TDX the report is traded for a quote at the cloud's metadata service, an address within the host:

    POST http://169.254.169.254/acc/tdquote   {"report": base64url}   ->   {"quote": base64url}

The answer is hostile until a verifier judges it; the service can refuse, no more. Sealing key and counter are the
TPM's, see `vtpm`: the paravisor keeps its state, sealed by the cloud.
"""

import base64
import http.client
import json

from obfuscatune.errors import AttestationError, FormatError
from obfuscatune.parties.attestation import azure
from obfuscatune.parties.attestation.dcap_layout import body_of
from obfuscatune.parties.attestation.evidence import MAX_QUOTE_BYTES, Attester, Quote
from obfuscatune.parties.attestation.quoting import check_report_data
from obfuscatune.parties.attestation.tpm2_tools import Tools
from obfuscatune.parties.attestation.vtpm import VtpmPlatform, quote_pcrs

REPORT_INDEX = "0x01400001"
KEY_HANDLE = "0x81000003"
SERVICE = ("169.254.169.254", 80)  # link-local: reached without a name, a proxy or a redirect
_PATH = "/acc/tdquote"
_SECONDS = 30.0
_MAX_ANSWER_BYTES = 2 * MAX_QUOTE_BYTES
_TD_REPORT_DATA = slice(128, 192)  # of the TD report, in its REPORTMACSTRUCT


class AzurePlatform(VtpmPlatform):
    """The platform "azure"; attributes as of `VtpmPlatform`."""

    name = "confidential VM of Azure"

    def __init__(self) -> None:
        super().__init__()
        self.attester: Attester = AzureAttester(self._tools)


class AzureAttester:
    """Evidence of a machine: the paravisor's report, and a fresh quote of its TPM.

    Args:
        tools: of the machine's TPM. service: host and port of the metadata service; another one in tests.
    """

    def __init__(self, tools: Tools, service: tuple[str, int] = SERVICE) -> None:
        self._tools, self._service = tools, service
        # The report stays as it is until the machine stops, and so may its quote: the service limits who asks often.
        self._quoted: tuple[bytes, bytes] = b"", b""

    def quote(self, report_data: bytes) -> Quote:
        """Return the HCL report, with ``tpm_quote`` over SHA-256(``report_data``), ``signature`` and ``pcrs``.

        Of a TD, ``td_quote`` too, and zeros in place of its report.

        Raises:
            AttestationError: no such report or key in this TPM, or it refuses; of a TD, no quote from the service.
        """
        check_report_data(report_data)
        with self._tools.work() as directory:
            report = self._tools.run("tpm2_nvread", "-C", "o", REPORT_INDEX)
            message, extras = quote_pcrs(self._tools, directory, KEY_HANDLE, report_data)
        try:
            parts = azure.parse(report)
        except FormatError as error:
            raise AttestationError(f"the TPM's HCL report: {error.what}", where=f"NV index {REPORT_INDEX}") from None
        extras["tpm_quote"] = message
        if parts.hardware == "tdx":
            extras[azure.TD_QUOTE] = self._td_quote(parts.report[: azure.TD_REPORT_BYTES])
            report = azure.without_report(report)
        return Quote("azure", report, extras)

    def _td_quote(self, report: bytes) -> bytes:
        known, quote = self._quoted
        if known != report:
            quote = _fetch(self._service, report)
            self._quoted = report, quote
        return quote


def _fetch(service: tuple[str, int], report: bytes) -> bytes:
    """Return the quote of a TD report; raises AttestationError where the service gives none, or one of another TD."""
    body = json.dumps({"report": base64.urlsafe_b64encode(report).rstrip(b"=").decode()})
    where = f"http://{service[0]}:{service[1]}{_PATH}"
    connection = http.client.HTTPConnection(*service, timeout=_SECONDS)
    problem = ""
    try:
        connection.request("POST", _PATH, body, {"Content-Type": "application/json", "Metadata": "true"})
        response = connection.getresponse()
        data = response.read(_MAX_ANSWER_BYTES + 1)
        if response.status != http.client.OK:
            problem = f"status {response.status}"
    except (OSError, http.client.HTTPException) as error:
        problem = f"a {type(error).__name__}"
    finally:
        connection.close()
    if problem:
        raise AttestationError("the cloud's metadata service gives no quote of the TD", got=problem, where=where)
    try:
        if len(data) > _MAX_ANSWER_BYTES:
            raise ValueError
        text = json.loads(data)["quote"].rstrip("=")
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        matches = body_of(raw, "tdx").report_data == report[_TD_REPORT_DATA]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FormatError):
        raise AttestationError("the cloud's metadata service answers with no quote of a TD", where=where) from None
    if not matches or len(raw) > MAX_QUOTE_BYTES:
        raise AttestationError("the quote of the cloud's metadata service is not of this TD report", where=where)
    return raw
