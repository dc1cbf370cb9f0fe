"""The benchmark: cost against Hugging Face + PEFT in the clear, and estimates from shapes alone."""
