"""The roots of trust of the manufacturers, by the SHA-256 of their DER certificates.

Certificates come with the evidence; a hash decides which of them is a root. Compare with the manufacturers' own pages:
Intel, "Intel SGX Root CA" (certificates.trustedservices.intel.com); AMD, the ``cert_chain`` of each product
(kdsintf.amd.com/vcek/v1/<product>/cert_chain); Amazon, "aws.nitro-enclaves" (AWS_NitroEnclaves_Root-G1.zip); NVIDIA,
"NVIDIA Device Identity CA" (``verifier_device_root.pem`` of NVIDIA/nvtrust and of the package nv-local-gpu-verifier).
"""

from collections.abc import Mapping

INTEL_SGX_ROOT = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"

AWS_NITRO_ROOT = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"

NVIDIA_DEVICE_ROOT = "102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48"

# AMD root key (ARK) to product. The product says how a TCB version is laid out.
AMD_ROOTS: Mapping[str, str] = {
    "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd": "Milan",
    "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1": "Genoa",
    "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a": "Turin",
}
