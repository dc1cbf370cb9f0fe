"""Fine-tuning a protected model with the stock ``Trainer``: checkpoints that resume bit for bit, logs, interrupts."""
