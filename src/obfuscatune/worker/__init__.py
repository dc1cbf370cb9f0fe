"""The worker: an untrusted server of keyed products, outside the enclave.

It holds keyed weights, sees keyed activations, and knows neither tokens, labels, texts, keys nor the model's name. It
imports
:mod:`obfuscatune.protocol` and torch, and nothing of ``keys``, ``families``, ``folding`` or ``enclave`` (a test
proves it).
"""
