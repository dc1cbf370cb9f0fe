"""One model's workers as one multiplier: a product is sent to all as shares, and had from as many replies as it needs.

A share of a call goes to one worker, once: nothing is ever sent again, to it or to another. Where a worker is lost,
what the others return is enough if there is a spare; if not, all of it ends. Where the spare was late and so not asked,
the rows are shared anew, under masks of their own. A product that is wrong ends it all.
"""

import itertools
import queue
import time
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.keys.source import Secret
from obfuscatune.enclave.lifetime import close_all
from obfuscatune.enclave.replies import Pending
from obfuscatune.enclave.session import Session
from obfuscatune.enclave.sharing import coding
from obfuscatune.enclave.sharing.check import FieldCheck
from obfuscatune.enclave.sharing.fixed import Side, fixed
from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.enclave.sharing.uniform import Uniform
from obfuscatune.enclave.sharing.waiting import Answer, Box, Waiting
from obfuscatune.enclave.sharing.weights import weight_shares
from obfuscatune.enclave.shelf import Expected
from obfuscatune.errors import UsageError, WorkerFault
from obfuscatune.protocol.expand import drawn

TILE_ROWS = 256  # a call's rows go in parts, so that encoding, products and decoding overlap
_TILE_ROWS_HERE = 512  # at workers of this machine: they share its cores, and read their weights once for each part
_LIED = "the sessions ended by a product that was wrong"
_AHEAD = 4  # parts under way


@dataclass(frozen=True, slots=True, repr=False)  # a repr would show the check's vectors
class SharedWeight:
    """A weight on all workers: its name there, its path in the model, and what the enclave keeps of it."""

    segment: str
    path: str
    forward: Side
    backward: Side
    check: FieldCheck


@dataclass(slots=True)
class Seconds:
    """Of the enclave: CPU time for shares, and for results with their check; time of sending, and of waiting."""

    encode: float = 0.0
    send: float = 0.0
    wait: float = 0.0
    decode: float = 0.0


@dataclass(slots=True, repr=False)
class _Part:
    """Some rows of a call, under way."""

    rows: coding.Rows
    count: int
    asked: list[int]
    pending: dict[int, Pending]
    box: Box


class Workers(Secret):
    """The workers of one model, one for each point of the scheme.

    Args:
        sessions: with them. uniform: the masks, and the check's vectors. verify: check every product.
    """

    def __init__(self, sessions: Sequence[Session], scheme: Scheme, uniform: Uniform, *, verify: bool) -> None:
        self.sessions, self.scheme = list(sessions), scheme
        self.seconds = Seconds()
        self.largest_error = 0.0
        self._uniform, self._verify = uniform, verify
        self._lost: set[int] = set()
        self._has_lied = False
        self._waiting = Waiting(len(self.sessions)) if scheme.spares else None
        if self._waiting is not None:
            weakref.finalize(self, self._waiting.close)
        self._tile = _TILE_ROWS_HERE if all(session.shares_memory for session in self.sessions) else TILE_ROWS
        self._number = uniform.number()
        self._segments = 0

    def define(self, path: str, weight: Tensor) -> SharedWeight:
        """Share a weight ``[in, out]`` anew, and send each worker its share. Raises WorkerFault."""
        integers = fixed(weight, self.scheme, path)
        check = FieldCheck(integers.integers, self.scheme, self._uniform, None if self._verify else 0)
        segment = f"s{self._segments}"
        self._segments += 1
        seeds, shares = weight_shares(integers, self.scheme, self._uniform)
        sent = []
        for i, (session, point) in enumerate(zip(self.sessions, self.scheme.points, strict=True)):
            spec = {"primes": list(self.scheme.primes), "point": point, "sharing": self._number}
            header = {"segment": segment, "kind": "residues", "spec": spec}
            sent.append(session.submit("define", path, *self._share("weight", header, seeds, shares, i), {}))
        for pending in sent:
            pending.result()
        self.largest_error = max(self.largest_error, integers.forward.error)
        return SharedWeight(segment, path, integers.forward, integers.backward, check)

    def product(self, weight: SharedWeight, x: Tensor, *, transpose: bool) -> Tensor:
        """Return ``x W`` float32 ``[n, out]``, or with the transpose, for x float32 ``[n, in]``.

        A row that is not finite, as those of padding are in some models, gives NaN.

        Raises:
            WorkerFault: too few workers are left, or one of them is wrong; named, where a spare tells which.
            UsageError: it has ended before.
        """
        self._refuse_ended(weight)
        side = weight.backward if transpose else weight.forward
        out = torch.empty(len(x), len(side.after))
        under_way: deque[tuple[Tensor, _Part, Tensor]] = deque()
        for rows, results in zip(torch.split(x, self._tile), torch.split(out, self._tile), strict=True):
            if len(under_way) == _AHEAD:
                self._finish(weight, *under_way.popleft(), transpose=transpose)
            under_way.append((rows, self._send(weight, rows, transpose=transpose), results))
        while under_way:
            self._finish(weight, *under_way.popleft(), transpose=transpose)
        return out

    def _send(self, weight: SharedWeight, x: Tensor, *, transpose: bool) -> _Part:
        side, (images, _) = weight.backward if transpose else weight.forward, self._vectors(weight, transpose)
        self._refuse_too_few(weight)
        started = time.process_time()
        seeds, planes = self._uniform.drawn(self.scheme, x.shape)
        asked = self._asked()
        made = range(len(seeds), len(self.sessions))
        memory = [self.sessions[i].empty if i in asked else torch.empty for i in made]
        out = [empty(planes.shape[1:], dtype=torch.int8) for empty in memory]
        rows = coding.encode(self.scheme, x, side.before, planes, most=side.most, vectors=images, out=out)
        self.seconds.encode += time.process_time() - started
        started = time.perf_counter()
        header = {"segment": weight.segment, "transpose": transpose}
        expected = {"y": ((len(self.scheme.primes), len(x), len(side.after)), torch.int8)}
        part = _Part(rows, len(x), asked, {}, Box())
        for i in asked:
            message = self._share("x", header, seeds, rows.shares, i)
            submit = partial(self._submit, part, i, weight.path, message, expected)
            if self._waiting is not None:
                self._waiting.ask(i, submit, part.box)
                continue
            try:
                submit()
            except (WorkerFault, UsageError):
                if self.sessions[i].has_ended:  # else a request that cannot be sent to anybody
                    self.close()
                raise
        rows.shares.clear()  # two of them together are the rows
        self.seconds.send += time.perf_counter() - started
        return part

    def _submit(
        self, part: _Part, i: int, layer: str, message: tuple[dict[str, Any], dict[str, Tensor]], expected: Expected
    ) -> Pending:
        part.pending[i] = pending = self.sessions[i].submit("multiply", layer, *message, expected)
        return pending

    def _refuse_ended(self, weight: SharedWeight) -> None:
        """Refuse what nobody would answer, here and not in the threads of `Waiting`: a forked process has none."""
        if self.sessions[0].is_copy() or all(session.has_ended for session in self.sessions):
            self.sessions[0].refuse_ended(weight.path)
        self._refuse_too_few(weight)

    def _refuse_too_few(self, weight: SharedWeight) -> None:
        """Refuse to go on with too few workers, once a WorkerFault has told that they are lost."""
        if len(self.sessions) - len(self._lost) < self.scheme.needed:
            self.sessions[min(self._lost)].refuse_ended(weight.path)

    def _asked(self) -> list[int]:
        """The workers that are not lost, without those that owe many replies, as long as enough others are left."""
        left = [i for i in range(len(self.sessions)) if i not in self._lost]
        prompt = [i for i in left if self._waiting is None or not self._waiting.is_late(i)]
        return prompt if len(prompt) >= self.scheme.needed else left  # where many threads ask at once, all owe many

    def _share(
        self, name: str, header: dict[str, Any], seeds: Sequence[bytes], shares: Sequence[Tensor], i: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors of a message with worker i's share: the tensor, or the seed that it is made of."""
        if i >= len(seeds):
            return header, {name: shares[i].contiguous()}
        return {**header, "drawn": {name: drawn(seeds[i], self.scheme.primes, shares[i].shape[1:])}}, {}

    def _finish(self, weight: SharedWeight, x: Tensor, part: _Part, out: Tensor, *, transpose: bool) -> None:
        side, (_, vectors) = weight.backward if transpose else weight.forward, self._vectors(weight, transpose)
        started = time.perf_counter()
        while (replies := self._replies(part)) is None:
            part = self._send(weight, x, transpose=transpose)
        self.seconds.wait += time.perf_counter() - started
        started = time.process_time()
        y = self._decode(replies, part, side, vectors)
        self.seconds.decode += time.process_time() - started
        if y is None:
            raise self._wrong(weight, part, replies, side, vectors)
        out.copy_(y)

    def _decode(self, replies: Mapping[int, Tensor], part: _Part, side: Side, vectors: Tensor) -> Tensor | None:
        used = sorted(replies)[: self.scheme.needed]
        points = [self.scheme.points[i] for i in used]
        shares = [replies[i] for i in used]
        return coding.decode(self.scheme, points, shares, side.after, rows=part.rows, vectors=vectors)

    def _replies(self, part: _Part) -> dict[int, Tensor] | None:
        """As many replies as are needed, the first that come; all of them where there is no spare.

        None where a worker was lost, and with those that were late and not asked there are enough others.
        """
        if self._waiting is None:
            try:
                return {i: pending.result(in_place=True)[1]["y"] for i, pending in part.pending.items()}
            except WorkerFault:
                self.close()
                raise
        found: dict[int, Tensor] = {}
        for _ in part.asked:
            self._take(part.box.get(), found)
            if len(found) == self.scheme.needed:
                return found
        return None

    def _take(self, answer: tuple[int, Answer], found: dict[int, Tensor]) -> None:
        i, reply = answer
        if isinstance(reply, Tensor):
            found[i] = reply
        elif isinstance(reply, WorkerFault | UsageError) and self.sessions[i].has_ended:  # its error is the latter
            self._lose(i, reply)
        else:  # a request that cannot be sent to anybody
            raise reply

    def _lose(self, i: int, fault: WorkerFault | UsageError) -> None:
        """Go on without a worker, if there are enough others."""
        if self._has_lied:  # another thread has ended all sessions: nobody is lost
            raise UsageError(_LIED, where=fault.where) from fault
        first = i not in self._lost
        self._lost.add(i)
        self.sessions[i].close()
        if len(self.sessions) - len(self._lost) < self.scheme.needed:
            self.close()
            raise fault
        if first:
            left = len(self.sessions) - len(self._lost) - self.scheme.needed
            warnings.warn(
                f"a worker is lost, and a spare stands in: {self.sessions[i].worker} ({fault.what}). "
                f"{left} more may be lost.",
                stacklevel=2,
            )

    def _wrong(
        self, weight: SharedWeight, part: _Part, replies: dict[int, Tensor], side: Side, vectors: Tensor
    ) -> WorkerFault:
        """End it all, and return the error that names the liar, where more replies than are needed tell."""
        self._has_lied = True  # from here on no thread goes on: not while this one waits, nor after an interrupt
        weight.check.discard()
        cause: BaseException | None = None
        try:
            if self._waiting is not None:
                self._take_all(part, replies)
        except BaseException as interrupt:  # Ctrl-C, say: whoever resumes must know that it was not that alone
            cause = interrupt
        finally:
            self.close()
        liars: list[int] = []
        for used in itertools.combinations(sorted(replies), self.scheme.needed):
            if self._decode({i: replies[i] for i in used}, part, side, vectors) is None:
                continue
            for i in set(replies) - set(used):
                other = {j: replies[j] for j in (*used[1:], i)}
                if self._decode(other, part, side, vectors) is None:
                    liars.append(i)
            break
        named = liars or list(replies)
        fault = WorkerFault(
            "a product is wrong",
            worker=self._names(named),
            layer=weight.path,
            call=part.pending[named[0]].id,  # to each of them, unless one has been lost, of the same number
            hint=self._hint(liars, replies),
        )
        fault.__cause__ = cause
        return fault

    def _hint(self, liars: Sequence[int], replies: Mapping[int, Tensor]) -> str:
        """What the names of a fault mean: an honest worker is not to be taken for a liar."""
        spares = self.scheme.spares
        if liars:
            told = len(replies) - self.scheme.needed
            return f"named as if no more than {told} lied: more together can make it look like another"
        if not spares:
            return "one of them is wrong; with a spare worker, spares=1, it is named"
        missing = [i for i in range(len(self.sessions)) if i not in replies]
        if len(missing) < spares:
            return f"more workers are wrong than the {spares - len(missing)} that could be named"
        return f"one of them at least is wrong, which cannot be told: the spares stood in for {self._names(missing)}"

    def _take_all(self, part: _Part, replies: dict[int, Tensor]) -> None:
        """Wait for a reply or an end of each worker, no longer than for one reply.

        A liar may leave after its lie: it is in both, and counted once. Nobody's end takes the place of the fault: it
        would name an honest worker for a liar.
        """
        until = time.monotonic() + max(session.timeout for session in self.sessions)
        while set(part.asked) - set(replies) - self._lost:
            try:
                i, reply = part.box.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return
            if isinstance(reply, Tensor):
                replies[i] = reply
            else:
                self._lost.add(i)

    def _vectors(self, weight: SharedWeight, transpose: bool) -> tuple[Tensor, Tensor]:
        sides = weight.check.sides(transpose=transpose)
        if sides is None or self._has_lied:
            raise UsageError(_LIED, where=weight.path)
        return sides

    def _names(self, numbers: Sequence[int] | Mapping[int, object]) -> str:
        return " or ".join(self.sessions[i].worker for i in numbers)

    def close(self) -> None:
        """End all sessions."""
        close_all(self.sessions)
