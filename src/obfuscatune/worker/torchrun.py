"""What torchrun tells a process of a worker, and how long the process stays when torchrun ends it."""

import os

ENDING_SECONDS = 10.0  # of a session when torchrun ends the group: for its enclave to ask, and be told who is gone


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank, and how many there are; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
