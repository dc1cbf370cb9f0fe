"""The optimizers that a worker has for LoRA factors of its own, and the options that may cross, by name."""

OPTIMIZER_OPTIONS: dict[str, frozenset[str]] = {
    "adamw": frozenset({"lr", "betas", "eps", "weight_decay", "amsgrad"}),
    "sgd": frozenset({"lr", "momentum", "dampening", "weight_decay", "nesterov"}),
}
