"""The workers of one model: the session with each, what the enclave keeps of it, and which blocks it gets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from obfuscatune.enclave.families import Block
from obfuscatune.enclave.remote.cache import CacheMirror
from obfuscatune.enclave.remote.passes import Passes
from obfuscatune.enclave.session import Session
from obfuscatune.errors import UsageError


@dataclass
class Link:
    """One worker of a model.

    Attributes:
        session: with the worker. mirror, passes: of the KV caches and the masks that it holds.
        memory_bytes: what the worker says that a session may take; None where it does not say.
        blocks: paths of the blocks whose weights it has. parameters: their number, keyed.
    """

    session: Session
    memory_bytes: int | None = None
    blocks: list[str] = field(default_factory=list)
    parameters: int = 0

    def __post_init__(self) -> None:
        self.mirror = CacheMirror(self.session)
        self.passes = Passes(self.session)

    @classmethod
    def greet(cls, session: Session) -> "Link":
        """Greet the worker of a session, and return its link. Raises WorkerFault."""
        told = session.hello().get("memory_bytes")
        return cls(session, told if type(told) is int and told > 0 else None)


def bytes_of(block: Block) -> int:
    """Bytes of a block's linear layers, as they are sent."""
    return sum(layer.weight.numel() * layer.weight.element_size() for layer in block.layers)


def spread(sizes: Sequence[int], links: Sequence[Link]) -> list[int]:
    """Return the index of the worker for each block: runs of blocks that follow each other, in the workers' order.

    Each worker's run is as near to its share of all memory as whole blocks allow; workers that do not say what they can
    hold share alike. Every worker gets a block at least.

    Args:
        sizes: bytes of each block.

    Raises:
        UsageError: more workers than blocks, or a run that its worker cannot hold.
    """
    if len(links) > len(sizes):
        raise UsageError("more workers than blocks", got=len(links), expected=f"at most {len(sizes)}")
    known = [link.memory_bytes for link in links if link.memory_bytes is not None]
    usual = min(known, default=1)
    shares = [usual if link.memory_bytes is None else link.memory_bytes for link in links]
    total, ends, placed = sum(sizes), list(accumulate(sizes)), []
    first = 0
    for number, share in enumerate(accumulate(shares)):
        later = len(links) - 1 - number  # workers that still need a block each
        last = first + 1
        # Until the middle of the next block is beyond what this worker and those before it shall have.
        while last < len(sizes) - later and (ends[last - 1] + ends[last]) / 2 <= total * share / sum(shares):
            last += 1
        placed += [number] * ((last if later else len(sizes)) - first)
        first = last
    for number, link in enumerate(links):
        needed = sum(size for size, where in zip(sizes, placed, strict=True) if where == number)
        if link.memory_bytes is not None and needed > link.memory_bytes:
            raise UsageError(
                "the workers cannot hold the model",
                got=f"{needed:,} bytes of weights for {placed.count(number)} blocks",
                expected=f"at most {link.memory_bytes:,}",
                where=link.session.worker,
                hint="give more workers, or more memory to a session: --memory_gb",
            )
    return placed
