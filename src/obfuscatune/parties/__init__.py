"""What the three parties of a job share: canonical text, identities, the job and its owners' terms.

The model provider and the data owner each hold an `identity`; `canonical` is the one encoding that is hashed and
signed; `job` is the contract that both sign, `terms` is what each of them allows.
"""
