"""What stands in the model for what has left: remote modules, LoRA slots, and the calls that both make."""
