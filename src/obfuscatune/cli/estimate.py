"""What a profile keeps in the enclave and what crosses the boundary, computed from shapes alone.

In a forward without an adapter and without padding, for one block of which nothing stays in the enclave:

=====================  =====  =====================  ==========================================
part, and its side     calls  numbers per token      parameters on the worker
=====================  =====  =====================  ==========================================
attention, worker      1      d out, d back          W_qkv, b_qkv, W_out
attention, enclave     2      in + out of both       W_qkv, W_out
MLP, worker            1      d out, d back          W_up, b_up, W_down
MLP, enclave           2      in + out of both       W_up, W_down
=====================  =====  =====================  ==========================================

A number is one element of the model's dtype. Framing adds up to about 200 bytes to a request and to a reply.
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from obfuscatune.families import FamilySpec
from obfuscatune.profiles import Profile


@dataclass(frozen=True, slots=True)
class Estimate:
    """Parameters on either side; calls, and bytes per token, of one keyed block in one forward."""

    profile: str
    enclave_parameters: int
    worker_parameters: int
    enclave_share: float
    keyed_blocks: int
    calls_per_layer: int
    bytes_sent_per_token_and_layer: int
    bytes_received_per_token_and_layer: int

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
    worker = calls = sent = received = 0
    for block in blocks:
        calls = sent = received = 0  # the same in every block
        for part, first, last, side in (
            (spec.attention, spec.qkv, spec.out, profile.attention),
            (spec.mlp, spec.up, spec.down, profile.mlp),
        ):
            parent = block.get_submodule(part)
            shapes = [tuple(spec.weight_in_out(parent.get_submodule(name)).shape) for name in (first, last)]
            (in_first, out_first), (in_last, out_last) = shapes
            worker += in_first * out_first + in_last * out_last
            if side == "worker":
                worker, calls = worker + out_first, calls + 1
                sent, received = sent + in_first, received + out_last
            else:
                calls += 2
                sent, received = sent + in_first + in_last, received + out_first + out_last
    return Estimate(
        profile=profile.name,
        enclave_parameters=total - worker,
        worker_parameters=worker,
        enclave_share=(total - worker) / total,
        keyed_blocks=len(blocks),
        calls_per_layer=calls,
        bytes_sent_per_token_and_layer=sent * itemsize,
        bytes_received_per_token_and_layer=received * itemsize,
    )
