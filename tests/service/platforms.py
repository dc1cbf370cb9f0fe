"""A platform in memory, and one whose counter is a file: for tests, with no protection at all."""

from pathlib import Path
from typing import Any


class Counter:
    def __init__(self, count: int = 0) -> None:
        self.count = count

    def read(self) -> int:
        return self.count

    def used(self) -> bool:
        return self.count > 0

    def increment(self) -> int:
        self.count += 1
        return self.count


class FileCounter:
    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> int:
        return int(self.path.read_text()) if self.path.exists() else 0

    def used(self) -> bool:
        return self.read() > 0

    def increment(self) -> int:
        count = self.read() + 1
        self.path.write_text(str(count))
        return count


class MemoryPlatform:
    attester: Any = None
    simulated = True
    name = "memory"

    def __init__(self, *, key: bytes | None = bytes(32), counter: Any = None) -> None:
        self.key, self.counter = key, counter

    def sealing_key(self) -> bytes | None:
        return self.key


def new_platform() -> MemoryPlatform:
    return MemoryPlatform(counter=Counter())
