"""How OpenMP's threads wait between two parallel products, where enclave and worker share cores.

libgomp spins for milliseconds by default, on the cores that the other process needs: that costs more than all keys do.
Threads that sleep at once must be woken for each of the small products of a decoding step, some hundred a token. So
they spin for some microseconds: GPT-2 small on two cores decodes in bfloat16 in 30 ms a token then, and in 40 ms
without. libgomp reads both variables when it is loaded, with torch.
"""

import os
import sys

WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
DEFAULT = {"GOMP_SPINCOUNT": "300000"}  # of libgomp, where no variable says anything


def wait_without_spinning() -> None:
    """Set the variables for this process and its children, unless torch is loaded or one of them is set."""
    if "torch" not in sys.modules and not is_chosen():
        os.environ.update(WAITING)


def is_chosen() -> bool:
    """Whether the environment says how threads wait."""
    return any(name in os.environ for name in WAITING)
