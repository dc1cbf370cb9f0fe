"""A SEV-SNP machine of Azure as platform: its paravisor's report, and quotes of the TPM that the paravisor keeps.

The report is in the TPM's own memory, made when the machine started; it binds the TPM's attestation key, which is there
too. The host hands out no certificates to the TPM's user: a verifier names them in the policy. Sealing key and counter
are the TPM's, see `vtpm`: the paravisor keeps its state, sealed by the cloud.
"""

from obfuscatune.parties.attestation.evidence import Attester, Quote
from obfuscatune.parties.attestation.quoting import check_report_data
from obfuscatune.parties.attestation.tpm2_tools import Tools
from obfuscatune.parties.attestation.vtpm import VtpmPlatform, quote_pcrs

REPORT_INDEX = "0x01400001"
KEY_HANDLE = "0x81000003"


class AzurePlatform(VtpmPlatform):
    """The platform "azure"; attributes as of `VtpmPlatform`."""

    name = "confidential VM of Azure"

    def __init__(self) -> None:
        super().__init__()
        self.attester: Attester = AzureAttester(self._tools)


class AzureAttester:
    """Evidence of a machine: the paravisor's report, and a fresh quote of its TPM."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def quote(self, report_data: bytes) -> Quote:
        """Return the HCL report, with ``tpm_quote`` over SHA-256(``report_data``), ``signature`` and ``pcrs``.

        Raises:
            AttestationError: no such report or key in this TPM, or it refuses.
        """
        check_report_data(report_data)
        with self._tools.work() as directory:
            report = self._tools.run("tpm2_nvread", "-C", "o", REPORT_INDEX)
            message, extras = quote_pcrs(self._tools, directory, KEY_HANDLE, report_data)
        return Quote("azure", report, {**extras, "tpm_quote": message})
