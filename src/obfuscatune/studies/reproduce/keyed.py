"""A model under keys in one process and any precision: the simple form of what enclave and worker do together.

Profile `paper` keys a linear layer, weights ``[in, out]``, as ``y = ((x R_in) W*) R_out^-1 + b`` with
``W* = R_in^-1 W R_out``. Its layers q,k,v and up have an input key alone, the layers after them an output key alone.
`protect` refuses float16, and a CPU's own float16 products differ from a GPU's. Here every product is that of a GPU in
dtype D: both factors rounded to D, sums in float32, the result rounded to D. W* is computed in float64 and rounded
once. All else of the model (embedding, norms, softmax, activation, residual sums) is that of transformers in D.

Secrecy: none; keys, plain weights and keyed weights are in one process. For measurements only.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from obfuscatune.enclave.families import read_decoder
from obfuscatune.enclave.folding import key_weight, unkey_rows
from obfuscatune.enclave.keys import IdentityKey, Key, MasterSecret, build
from obfuscatune.errors import UsageError

NONE, GAUSSIAN = "none", "gaussian"
DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
KeyPrecision = Literal["float32", "same"]  # of the key's own products: as ours, or in D as all else


def key_switches(keys: str) -> dict[str, Any]:
    """Return what to change in profile `paper` for ``none``, ``gaussian``, or a condition number such as ``32``.

    Raises:
        UsageError: it is none of these.
    """
    if keys == NONE:
        return {"keys": "identity"}
    if keys == GAUSSIAN:
        return {"keys": "gaussian"}
    try:
        return {"keys": "conditioned", "kappa": float(keys)}
    except ValueError:
        raise UsageError("keys to measure", got=keys, expected=f"{NONE}, {GAUSSIAN} or a condition number") from None


def rounded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix rounded to ``dtype``, held in the dtype that its products are summed in."""
    return matrix.to(dtype).to(torch.float64 if dtype == torch.float64 else torch.float32)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x M`` in the dtype of x, for M of `rounded`: exact products, sums in M's dtype, one rounding."""
    return (x.to(matrix.dtype) @ matrix).to(x.dtype)


class KeyedLinear(nn.Module):
    """Stands for a linear layer of the model; see the module. Gradients pass it, its own tensors are constants.

    Args:
        weight, bias: ``[in, out]`` and ``[out]`` of the plain layer.
        key_in, key_out: R_in and R_out.
        dtype: D. key_precision: ``float32`` rounds the keys' matrices to float32, ``same`` to D.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        key_in: Key,
        key_out: Key,
        *,
        dtype: torch.dtype,
        key_precision: KeyPrecision = "float32",
    ) -> None:
        super().__init__()
        of_keys = torch.float32 if key_precision == "float32" and dtype != torch.float64 else dtype
        self._key_in, self._key_out = key_in, key_out
        self.a: nn.Parameter | None = None
        self.b: nn.Parameter | None = None
        self.scale, self.outside = 1.0, True
        tensors = {
            "encoding": _dense(key_in, of_keys, inverse=False),
            "weight": rounded(key_weight(weight.detach(), key_in, key_out), dtype),
            "decoding": _dense(key_out, of_keys, inverse=True),
            "bias": None if bias is None else bias.detach().to(dtype),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def add_lora(self, a: Tensor, b: Tensor, scale: float, *, outside: bool) -> None:
        """Train ``x A B scale`` beside the weight.

        Args:
            a, b: plain factors ``[in, r]`` and ``[r, out]``; kept in float32 or wider.
            outside: in keyed coordinates, ``R_in^-1 A`` and ``B R_out``, as the paper's worker does; else plain ones.
        """
        self.scale, self.outside = scale, outside
        a, b = a.double(), b.double()
        if outside:
            a, b = unkey_rows(a, self._key_in), self._key_out.apply(b)
        dtype = self.get_buffer("weight").dtype
        self.a, self.b = nn.Parameter(a.to(dtype).contiguous()), nn.Parameter(b.to(dtype).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., out]`` for x ``[..., in]``, both in D."""
        keyed = x if self.encoding is None else product(x, self.get_buffer("encoding"))
        y = product(keyed, self.get_buffer("weight"))
        y = y + self._low_rank(keyed) if self.a is not None and self.outside else y
        y = y if self.decoding is None else product(y, self.get_buffer("decoding"))
        y = y + self._low_rank(x) if self.a is not None and not self.outside else y
        return y if self.bias is None else y + self.get_buffer("bias")

    def _low_rank(self, x: Tensor) -> Tensor:
        """``x A B scale``; the factors are wider than D, as PEFT keeps those of a model in half precision."""
        if self.a is None or self.b is None:
            raise UsageError("a layer without LoRA", hint="add_lora comes first")
        low: Tensor = ((x.to(self.a.dtype) @ self.a) @ self.b) * self.scale
        return low.to(x.dtype)


def _dense(key: Key, dtype: torch.dtype, *, inverse: bool) -> Tensor | None:
    if isinstance(key, IdentityKey):
        return None
    unit = torch.eye(key.size, dtype=torch.float64)
    return rounded(key.apply_inverse(unit) if inverse else key.apply(unit), dtype)


def key_model(
    model: Any, keys: str, *, dtype: torch.dtype, seed: int, key_precision: KeyPrecision = "float32"
) -> dict[str, KeyedLinear]:
    """Replace the large linear layers of a causal language model, and its head, in place; the rest goes to ``dtype``.

    Args:
        keys: as `key_switches` takes them. seed: of the keys, which are nobody's secret.

    Returns:
        The replacements by path, without the head, which stays un-keyed.
    """
    switches, identity = key_switches(keys), keys == NONE
    secret = MasterSecret.from_insecure_test_seed(seed)

    def key(path: str, size: int, *, outer: bool) -> Key:
        if identity or not outer:
            return IdentityKey(size)
        return build(switches["keys"], secret.stream("conditioning", path), size, kappa=switches.get("kappa", 1.0))

    def replace(parent: nn.Module, child: str, weight: Tensor, key_in: Key, key_out: Key) -> KeyedLinear:
        bias = getattr(parent.get_submodule(child), "bias", None)
        linear = KeyedLinear(weight, bias, key_in, key_out, dtype=dtype, key_precision=key_precision)
        setattr(parent, child, linear)
        return linear

    replaced = {}
    for block in read_decoder(model).blocks:
        for group in block.groups:
            for layer in group.layers:
                name, weight = layer.path, layer.weight
                key_in = key(f"{name} in", weight.shape[0], outer=not group.inner_in)
                key_out = key(f"{name} out", weight.shape[1], outer=not group.inner_out)
                replaced[name] = replace(layer.parent, layer.name, weight, key_in, key_out)
    head = model.get_output_embeddings().weight.detach().T
    replace(model, "lm_head", head, IdentityKey(head.shape[0]), IdentityKey(head.shape[1]))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    return replaced


def add_adapters(
    layers: dict[str, KeyedLinear], *, r: int, alpha: int, seed: int, outside: bool = True
) -> list[nn.Parameter]:
    """Add LoRA to every layer, its plain factors drawn as PEFT draws them (A Kaiming uniform, B zero); return them."""
    generator = torch.Generator().manual_seed(seed)
    trained: list[nn.Parameter] = []
    for layer in layers.values():
        size_in, size_out = layer._key_in.size, layer._key_out.size
        a = torch.empty(r, size_in)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        layer.add_lora(a.T, torch.zeros(r, size_out), alpha / r, outside=outside)
        trained += [parameter for parameter in (layer.a, layer.b) if parameter is not None]
    return trained
