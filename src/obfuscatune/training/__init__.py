"""Fine-tuning a protected model with the stock ``Trainer``: checkpoints that can be resumed bit for bit, logs, interrupts."""
