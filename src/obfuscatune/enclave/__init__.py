"""The enclave's side: the driver of the job.

Here are tokens, embeddings, norms, residual stream, head, loss, LoRA optimizer and keys. The stock ``transformers``
model runs here; its large submodules are replaced by remote ones, which key what they send and un-key what returns.
"""
