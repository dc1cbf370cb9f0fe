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

A number is one element of the model's dtype. Framing adds up to about 200 bytes to a request and to a reply.
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from obfuscatune.enclave.arithmetic import mixed_call, of_keys
from obfuscatune.enclave.families import FamilySpec
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


def estimate(model: nn.Module, spec: FamilySpec, profile: Profile, itemsize: int) -> Estimate:
    """Apply the module's table to a model, whose tensors may be on the meta device.

    Args:
        itemsize: bytes of one number on the wire.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    blocks = [
        block for index, _, block in spec.iter_blocks(model) if profile.remote and index >= profile.enclave_blocks
    ]
    worker = calls = sent = received = inside = outside = 0
    for index, block in enumerate(blocks):
        for part, first, last, side in (
            (spec.attention, spec.qkv, spec.out, profile.attention),
            (spec.mlp, spec.up, spec.down, profile.mlp),
        ):
            parent = block.get_submodule(part)
            shapes = [tuple(spec.weight_in_out(parent.get_submodule(name)).shape) for name in (first, last)]
            (in_first, out_first), (in_last, out_last) = shapes
            worker += in_first * out_first + in_last * out_last
            if part == spec.attention:
                attention = 2 * LENGTH * ROWS * in_last
                inside, outside = (inside + attention, outside) if side == "enclave" else (inside, outside + attention)
            if side == "worker":
                worker += out_first
                outside += ROWS * (in_first * out_first + in_last * out_last)
                if profile.rotate_stream:
                    worker += out_last
                if not profile.rotate_stream or (index == 0 and part == spec.attention):
                    calls, sent, received = calls + 1, sent + in_first, received + out_last
                    sizes = (in_first, out_last)
                    inside += ROWS * sum(of_keys(profile.keys, size, profile) for size in sizes)
                continue
            calls += 2
            families = (profile.keys, profile.inner_keys, profile.inner_keys, profile.keys)
            four = zip(families, (in_first, out_first, in_last, out_last), strict=True)
            inside += ROWS * sum(of_keys(family, size, profile) for family, size in four)
            for width, out in shapes:
                if profile.mix_rows:
                    call = mixed_call(ROWS, width, out, profile.mix_tile)
                    sent, received = sent + call.sent // ROWS, received + call.received // ROWS
                    inside, outside = inside + call.enclave, outside + call.worker
                else:
                    sent, received = sent + width, received + out
                    outside += ROWS * width * out
    return Estimate(
        profile=profile.name,
        enclave_parameters=total - worker,
        worker_parameters=worker,
        enclave_share=(total - worker) / total,
        keyed_blocks=len(blocks),
        calls=calls,
        bytes_sent_per_token=sent * itemsize,
        bytes_received_per_token=received * itemsize,
        enclave_arithmetic=inside / (inside + outside) if blocks else 1.0,
    )
