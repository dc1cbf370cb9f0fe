"""The optimizers that a worker has for LoRA factors of its own, and the options that may cross, by name."""

OPTIMIZER_OPTIONS: dict[str, frozenset[str]] = {
    "adamw": frozenset({"lr", "betas", "eps", "weight_decay", "amsgrad"}),
    "sgd": frozenset({"lr", "momentum", "dampening", "weight_decay", "nesterov"}),
}

# What torch's optimizers keep of a parameter in its own shape and dtype; besides, AdamW counts its steps in float32.
OPTIMIZER_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
