"""Record the evidence beside this file from a real swtpm: PYTHONPATH=src:tests python tests/vectors/tpm/record.py."""

import os
from pathlib import Path

from attestation.enclaves import claims
from attestation.swtpm import new_tpm

from obfuscatune.parties.attestation.evidence import attest
from obfuscatune.parties.attestation.vtpm import VtpmPlatform

KEYS = {"ecdsa": None, "rsassa": "rsa2048:rsassa-sha256:null"}  # the attester's own, and one as clouds provide it
HANDLE = "0x81018F01"  # where the attester looks for its key
ATTRIBUTES = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"

if __name__ == "__main__":
    for name, algorithm in KEYS.items():
        with new_tpm() as tpm, tpm.running():
            os.environ["TPM2TOOLS_TCTI"] = tpm.tcti
            if algorithm is not None:
                context = str(tpm.directory / "context")
                tpm.run("tpm2_createprimary", "-Q", "-C", "e", "-G", algorithm, "-a", ATTRIBUTES, "-c", context)
                tpm.run("tpm2_evictcontrol", "-Q", "-C", "o", "-c", context, HANDLE)
            evidence = attest(VtpmPlatform().attester, claims(issued=1_800_000_000).to_dict())
            (Path(__file__).parent / f"{name}.json").write_bytes(evidence.to_bytes())
