"""Names of the activation functions that every worker has: those of ``transformers``' configurations."""

ACTIVATION_NAMES = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")
