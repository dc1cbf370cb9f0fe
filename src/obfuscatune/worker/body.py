"""A whole decoder body on the worker: parts on one residual stream, whose norms have no gain."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.norms import rms_rows
from obfuscatune.worker.adapters import SlotInputs
from obfuscatune.worker.attention import AttentionSegment
from obfuscatune.worker.kv import Tokens
from obfuscatune.worker.parallel import ALONE, Group
from obfuscatune.worker.segments import Call, PartSegment, Segment


class BodySegment(Segment):
    """``x <- x + part(x / sqrt(mean(x^2) + eps)) + b`` for part after part, on ``[B, T, d]``.

    Where it is parallel, parts go in pairs that read the same x. The parts are attention and mlp segments that are
    defined already. A slot of part i is called ``i.<slot>``.
    """

    weights = ("bias",)

    def __init__(
        self,
        spec: dict[str, Any],
        tensors: dict[str, Tensor],
        defined: Mapping[str, Segment],
        group: Group = ALONE,
    ) -> None:
        super().__init__(spec, tensors, defined, group)
        names, eps, self.bias = spec.get("parts"), spec.get("eps"), tensors["bias"]
        known = {name: segment for name, segment in defined.items() if isinstance(segment, PartSegment)}
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n in known for n in names):
            raise ProtocolError("parts of a body", expected="names of attention and mlp segments")
        if not isinstance(eps, list) or len(eps) != len(names) or not all(map(_is_eps, eps)):
            raise ProtocolError("eps of a body", expected="a positive float for each part")
        self.parts, self.eps = [known[name] for name in names], eps
        self.stride = 2 if spec.get("parallel") else 1  # parts that read the same x
        widths = {width for p in self.parts for width in (p.weight["first"].shape[1], p.weight["last"].shape[0])}
        if len(widths) != 1 or list(self.bias.shape) != [len(names), *widths] or len(names) % self.stride:
            got = f"bias {list(self.bias.shape)}, parts of {sorted(widths)}"
            raise ProtocolError("widths of a body", got=got, expected="one width, and a row of bias for each part")

    def run(self, x: Tensor, slots: SlotInputs, call: Call) -> Tensor:
        """Return ``[B, T, d]`` and set ``call.present``."""
        present: list[Tokens] = []
        for first in range(0, len(self.parts), self.stride):
            calls = []
            for part in self.parts[first : first + self.stride]:
                inner = Call(mask=call.mask, uniform=call.uniform, rotary=call.rotary)
                if isinstance(part, AttentionSegment) and call.past is not None:
                    inner.past = call.past[len(present) : len(present) + 1]
                calls.append(inner)
            step = partial(self._step, first, slots, calls)
            # Nothing in a step is random, so there is no state to restore.
            x = checkpoint(step, x, use_reentrant=False, preserve_rng_state=False) if call.recompute else step(x)
            present += [tokens for inner in calls for tokens in inner.present or ()]
        call.present = tuple(present)
        return x

    def _step(self, first: int, slots: SlotInputs, calls: list[Call], x: Tensor) -> Tensor:
        y = x
        for i, call in enumerate(calls, first):
            y = y + self.parts[i].run(rms_rows(x, self.eps[i]), slots.of_part(i), call) + self.bias[i]
        return y


def _is_eps(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0
