"""What a profile keeps in the enclave and what crosses the boundary, computed from shapes alone.

In a forward without an adapter and without padding, for each block that does not stay in the enclave:

=====================  =====  =====================  ==========================================
part, and its side     calls  numbers per token      parameters on the worker
=====================  =====  =====================  ==========================================
attention, worker      1      d out, d back          W_qkv, b_qkv, W_out
attention, enclave     2      in + out of both       W_qkv, W_out
MLP, worker            1      d out, d back          W_up, b_up, W_down
MLP, enclave           2      in + out of both       W_up, W_down
=====================  =====  =====================  ==========================================

With ``mix_rows`` each linear layer sends tiles with their noise rows and gets a product for each tile. How many that
are depends on the tokens of a call; the table is for `ROWS` of them then. With ``rotate_stream`` all blocks together
are one call, d numbers out and d back, and the biases that write the residual stream are on the worker too.

Where rows are shared, each number is a byte for each prime, to and from each worker; the worker's parameters are those
that each of them has a share of.

Else a number is one element of the model's dtype. Framing adds up to about 200 bytes to a request and to a reply.
"""

from dataclasses import asdict, dataclass
from typing import Any

from obfuscatune.enclave.arithmetic import mixed_call, of_keys
from obfuscatune.enclave.families import Attention, Block, Decoder, Group, Part
from obfuscatune.enclave.recipes.shared import scheme_of
from obfuscatune.enclave.sharing.check import vectors_of
from obfuscatune.profiles import Profile

ROWS, LENGTH = 512, 128  # tokens of the call, and of one of its texts, that the estimate is for


@dataclass(frozen=True, slots=True)
class Estimate:
    """Parameters on either side; calls, bytes per token, and share of the arithmetic, of a forward of all keyed blocks.

    ``enclave_arithmetic`` counts multiply-adds of keys, mixing, checks and attention in the enclave, over all.
    """

    profile: str
    enclave_parameters: int
    worker_parameters: int
    enclave_share: float
    keyed_blocks: int
    calls: int
    bytes_sent_per_token: int
    bytes_received_per_token: int
    enclave_arithmetic: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def estimate(decoder: Decoder, profile: Profile, itemsize: int) -> Estimate:
    """Apply the module's table to a model in normal form, whose tensors may be on the meta device.

    Args:
        itemsize: bytes of one number on the wire.
    """
    total = sum(parameter.numel() for parameter in decoder.model.parameters())
    blocks = [block for block in decoder.blocks if profile.remote and block.index >= profile.enclave_blocks]
    sums = _Sums()
    for i, block in enumerate(blocks):
        whole = {"attention": profile.attention == "worker", "mlp": profile.mlp == "worker"}
        for name, part in (("attention", block.attention), ("mlp", block.mlp)):
            if part is not None and whole[name]:
                sums.add_whole(part, profile, crosses=not profile.rotate_stream or (i == 0 and name == "attention"))
        if block.attention is not None:
            sums.add_softmax(block.attention, inside=not whole["attention"])
        inside = [group for group in block.groups if not _is_whole(block, group, whole)]
        for group in inside:
            sums.add_group(group, profile)
    worker, sent, received = sums.worker, itemsize, itemsize
    if profile.shares:
        scheme = scheme_of(profile)  # of the first T shares only seeds are sent
        sent = profile.primes * (len(scheme.points) - scheme.threshold)
        received = profile.primes * len(scheme.points)
    return Estimate(
        profile=profile.name,
        enclave_parameters=total - worker,
        worker_parameters=worker,
        enclave_share=(total - worker) / total,
        keyed_blocks=len(blocks),
        calls=sums.calls,
        bytes_sent_per_token=sums.sent * sent,
        bytes_received_per_token=sums.received * received,
        enclave_arithmetic=sums.inside / (sums.inside + sums.outside) if blocks else 1.0,
    )


@dataclass(slots=True)
class _Sums:
    """Parameters on the worker; calls; numbers per token; multiply-adds on either side of a call of `ROWS` tokens."""

    worker: int = 0
    calls: int = 0
    sent: int = 0
    received: int = 0
    inside: int = 0
    outside: int = 0

    def add_whole(self, part: Part, profile: Profile, *, crosses: bool) -> None:
        """A part that is whole on the worker; ``crosses``: its input and output do."""
        width, columns = part.width, sum(layer.shape[1] for layer in part.first)
        (inner, out) = part.last.shape
        self.worker += width * columns + inner * out
        shifted = profile.fold_norms and part.norm.shift is not None
        self.worker += columns if part.first_bias() is not None or shifted else 0
        self.outside += ROWS * (width * columns + inner * out)
        self.worker += out if profile.rotate_stream else 0
        if crosses:
            self.calls, self.sent, self.received = self.calls + 1, self.sent + width, self.received + out
            self.inside += ROWS * sum(of_keys(profile.keys, size, profile) for size in (width, out))

    def add_softmax(self, attention: Attention, *, inside: bool) -> None:
        """What an attention does between its layers."""
        count = 2 * LENGTH * ROWS * attention.shape.query_width
        self.inside, self.outside = (
            (self.inside + count, self.outside) if inside else (self.inside, self.outside + count)
        )

    def add_group(self, group: Group, profile: Profile) -> None:
        """Linear layers that share an input, alone on the worker."""
        width, columns = group.layers[0].shape[0], [layer.shape[1] for layer in group.layers]
        out = sum(columns)
        self.worker, self.calls = self.worker + width * out, self.calls + 1
        family_in = profile.inner_keys if group.inner_in else profile.keys
        family_out = profile.inner_keys if group.inner_out else profile.keys
        keys = of_keys(family_in, width, profile) + sum(of_keys(family_out, size, profile) for size in columns)
        self.inside += ROWS * keys
        if profile.shares:
            scheme = scheme_of(profile)
            workers, checks = len(scheme.points), vectors_of(scheme) if profile.verify else 0
            self.sent, self.received = self.sent + width, self.received + out
            self.inside += ROWS * len(scheme.primes) * (width * (workers + checks) + out * (scheme.needed + checks))
            self.outside += ROWS * len(scheme.primes) * workers * width * out
        elif profile.mix_rows:
            call = mixed_call(ROWS, width, out, profile.mix_tile)
            self.sent, self.received = self.sent + call.sent // ROWS, self.received + call.received // ROWS
            self.inside, self.outside = self.inside + call.enclave, self.outside + call.worker
        else:
            self.sent, self.received = self.sent + width, self.received + out
            self.outside += ROWS * width * out


def _is_whole(block: Block, group: Group, whole: dict[str, bool]) -> bool:
    """Whether a group's layers are of a part that is whole on the worker."""
    parts = [part for name, part in (("attention", block.attention), ("mlp", block.mlp)) if whole[name] and part]
    return any(group.layers[0] is layer for part in parts for layer in part.layers)
