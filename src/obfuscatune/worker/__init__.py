"""The worker: an untrusted server of keyed products, outside the enclave.

It holds keyed weights, sees keyed activations, and knows neither tokens, labels, texts, keys nor the model's name. Of
this package it imports :mod:`obfuscatune.protocol` and :mod:`obfuscatune.errors`, and nothing else (a test proves it).
"""
