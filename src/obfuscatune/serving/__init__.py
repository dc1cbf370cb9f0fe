"""A protected model behind OpenAI's HTTP interface: ``obfuscatune serve``.

This process is the enclave: tokens, texts and adapters stay in it, and the worker gets what the profile sends. The chat
protocol is that of ``transformers.cli.serving``, the HTTP server is uvicorn with h11; ours are the batches, the limits,
and what is refused.
"""
