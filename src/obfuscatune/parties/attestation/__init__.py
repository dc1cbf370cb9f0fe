"""Attestation: a signed statement of the hardware about what runs in an enclave, and the judgement of it by a policy.

The attester's side makes evidence (`configfs`, `gramine`, `vtpm`, `simulator`); the verifier's side judges it
(`policy`, `verify`, `dcap`, `snp`, `tpm`). Both share the record in `evidence`. The simulator makes the real formats
under a root of its own, which no policy accepts unless it names it.
"""
