"""What `obfuscatune enclave serve` runs: sealed state, audit log, store of sealed files, queue and runner of jobs.

All of it is the enclave's side. What it writes to the operator's disk is sealed or holds no content.
"""
