"""One thread for the small tensors of a decoding step: to wake another takes longer than they do.

Enclave and worker share cores, so OpenMP's threads sleep soon after each product (`protocol/waiting.py`). A layer norm
of 4 rows of 768 takes 3 us on one thread, and 10 to 55 us where a second one has to be woken; blocks of a key for 16
rows of 256 take 26 us, and 80 to 280. The busier the cores, the more: with the other side's threads, a server's and its
clients'. A model does some ten such operations for each layer and token.
"""

from types import TracebackType

import torch

_SMALL = 1 << 22  # multiply-adds, which take one thread about as long as waking another: some 50 us


class threads_for:  # noqa: N801  (a context manager, faster than one made by contextlib)
    """Within it torch computes on one thread if the work is small, and as before if not.

    The number of threads is of the calling thread alone, and others that run the model are not slowed down. But one
    that computes for the first time just then has one thread from then on: torch gives it the number set last.

    Args:
        multiply_adds: of the work.
    """

    __slots__ = ("_before", "_small")

    def __init__(self, multiply_adds: int) -> None:
        self._small = multiply_adds <= _SMALL

    def __enter__(self) -> None:
        if self._small:
            self._before = torch.get_num_threads()
            torch.set_num_threads(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._small:
            torch.set_num_threads(self._before)
