"""Cells of an experiment: each computed once, kept in a file of its own, so that a killed run goes on where it was."""

import hashlib
import json
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from obfuscatune import __version__
from obfuscatune.errors import ObfuscatuneError
from obfuscatune.studies.reports.files import write_text
from obfuscatune.studies.reports.provenance import describe_commit

Value = dict[str, Any]

LIBRARIES = ("torch", "transformers", "peft")  # that compute; the report tells their versions


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One value of an experiment.

    Args:
        label: for the progress bar.
        compute: module-level function ``(inputs, places) -> value``, run in this process or in one of its own.
        inputs: all that decides the value, as plain values: settings, seed, threads, digests of data and model.
        places: what the function needs beside them and what decides nothing: paths, options of display.
        memory_gb: what it takes at most, GiB of all its processes.
    """

    label: str
    compute: Callable[[dict[str, Any], dict[str, Any]], Value]
    inputs: dict[str, Any]
    places: dict[str, Any] = field(default_factory=dict)
    memory_gb: float = 1.0

    @property
    def key(self) -> str:
        """SHA-256 of function, inputs and the versions of the package and of `LIBRARIES`: 64 hex digits."""
        name = f"{self.compute.__module__}.{self.compute.__qualname__}"
        decides: Value = {"compute": name, "inputs": self.inputs, "version": __version__}
        decides["libraries"] = {name: version(name) for name in LIBRARIES}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


class CellCache:
    """Values of cells, a JSON file each, ``KEY.json``: ``{"inputs", "value", "commit", "dirty"}``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def load(self, cell: Cell) -> Value | None:
        """Return the cell's value, or None where there is none that can be read."""
        record = self._read(cell)
        return None if record is None else record["value"]

    def store(self, cell: Cell, value: Value, commit: Value) -> None:
        """Keep a value, with the commit that computed it (`describe_commit`). Raises ObfuscatuneError."""
        record = {"inputs": cell.inputs, "value": value, **commit}
        write_text(self._path(cell), json.dumps(record, sort_keys=True) + "\n")

    def commits(self, cells: Sequence[Cell]) -> list[str]:
        """Return the commits that computed the cells, ``+`` after one whose package was changed: one, as a rule."""
        records = [record for record in map(self._read, cells) if record is not None]
        return sorted({f"{record['commit']}{'+' if record['dirty'] else ''}" for record in records})

    def _path(self, cell: Cell) -> Path:
        return self.directory / f"{cell.key}.json"

    def _read(self, cell: Cell) -> dict[str, Any] | None:
        try:
            record = json.loads(self._path(cell).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(record, dict) and {"inputs", "value", "commit", "dirty"} <= record.keys()
        return record if whole else None


def run_cells(
    cells: Sequence[Cell], cache: CellCache, *, workers: int = 1, memory_gb: float | None = None
) -> list[Value]:
    """Return the value of each cell, computing those that the cache has not; each is kept as soon as it is there.

    Args:
        workers: cells at a time, in processes of their own; 1 computes them in this process, one after another.
        memory_gb: what all of them may take together; what the machine has free by default.

    Raises:
        ObfuscatuneError: a cell's own, or that its process was killed. Cells that are done stay in the cache.
    """
    missing = [cell for cell in cells if cache.load(cell) is None]
    commit = describe_commit()  # of the code that runs: the files may change while it does
    with tqdm(total=len(cells), initial=len(cells) - len(missing), unit="cell", disable=not cells) as bar:
        at_once = min(workers, _fitting(missing, memory_gb), len(missing))
        for cell, value in _in_processes(missing, at_once, bar) if at_once > 1 else _here(missing, bar):
            cache.store(cell, value, commit)
            bar.update()
    return [_stored(cache, cell) for cell in cells]


def _here(cells: Sequence[Cell], bar: Any) -> Iterator[tuple[Cell, Value]]:
    for cell in cells:
        bar.set_description(cell.label)
        yield cell, cell.compute(cell.inputs, cell.places)


def _in_processes(cells: Sequence[Cell], workers: int, bar: Any) -> Iterator[tuple[Cell, Value]]:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        futures: dict[Future[Value], Cell] = {pool.submit(c.compute, c.inputs, c.places): c for c in cells}
        fault: BaseException | None = None
        try:
            for future in as_completed(futures):
                bar.set_description(futures[future].label)
                if future.cancelled():
                    continue
                if (error := future.exception()) is None:
                    yield futures[future], future.result()
                elif fault is None:  # those that run are waited for, and kept
                    fault = error
                    for other in futures:
                        other.cancel()
        finally:
            pool.shutdown(cancel_futures=True)
    if isinstance(fault, BrokenProcessPool):
        hint = "fewer --workers, or more memory; what is done is kept"
        raise ObfuscatuneError("the process of a cell was killed", hint=hint) from fault
    if fault is not None:
        raise fault


def _end_with_parent() -> None:
    """End this process when the one that started it has gone, however it went: nobody would take its value."""
    threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _fitting(cells: Sequence[Cell], memory_gb: float | None) -> int:
    """How many cells fit into the memory at once; at least one, which may then fail by itself."""
    free = _available_gb() if memory_gb is None else memory_gb
    return max(1, int(free / max((cell.memory_gb for cell in cells), default=1.0)))


def _available_gb() -> float:
    """What processes can still get, GiB: free pages, and those that the kernel would give back."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text() if meminfo.exists() else "", re.MULTILINE)
    return int(found[1]) / 2**20 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _stored(cache: CellCache, cell: Cell) -> Value:
    value = cache.load(cell)
    if value is None:
        raise ObfuscatuneError("a cell vanished from the cache", where=str(cache.directory))
    return value
