"""The tasks of lm-evaluation-harness, offline, and the adapter through which it sees a protected model."""
