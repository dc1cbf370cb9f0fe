"""The relative error of one linear layer under a key on its input: condition number against precision, nothing else."""

from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.keys import DenseKey, IdentityKey, Key, MasterSecret, build
from obfuscatune.studies.reproduce.keyed import DTYPES, GAUSSIAN, NONE, KeyedLinear, KeyPrecision, key_switches

DTYPE_NAMES = ("float32", "bfloat16", "float16")
UNIFORM = "uniform"  # entries uniform in [0, 1): "arbitrary random matrices" at their worst
# One layer of d = 1280, relative Frobenius error: what this project worked out before it had code. Not
# the paper's Table 2, which is not known to us.
EXPECTED_WIDTH = 1280
EXPECTED: dict[str, dict[str, float]] = {
    NONE: {"float32": 3.0e-7, "bfloat16": 2.9e-3},
    "1": {"float32": 5.4e-7, "bfloat16": 4.4e-3},
    "8": {"float32": 9.2e-7, "bfloat16": 6.4e-3},
    "32": {"float32": 1.7e-6, "bfloat16": 1.1e-2},
    "128": {"float32": 3.6e-6, "bfloat16": 2.3e-2},
    "160": {"float32": 4.5e-6, "bfloat16": 2.9e-2},
    GAUSSIAN: {"float32": 3.8e-5, "bfloat16": 0.26},
    UNIFORM: {"float32": 8.5e-5, "bfloat16": 0.56},
}


def draw_key(keys: str, size: int, secret: MasterSecret) -> Key:
    """Return a key by the name that tables give it; see `key_switches`, and ``uniform``."""
    stream = secret.stream("one layer")
    if keys == UNIFORM:
        matrix = stream.uniform(size, size)
        singular = torch.linalg.svdvals(matrix)
        return DenseKey(UNIFORM, matrix, torch.linalg.inv(matrix), (singular[-1].item(), singular[0].item()))
    switches = key_switches(keys)
    return build(switches["keys"], stream, size, kappa=switches.get("kappa", 1.0))


def layer_errors(keys: str, *, width: int, rows: int, seed: int) -> dict[str, Any]:
    """Return ``{"condition", "errors": {dtype: {key precision: error}}}``.

    The error is ``|y - x W| / |x W|`` (Frobenius, the right side in float64), with rows and weights [width, width] of
    N(0, 1) and N(0, 1 / width). Profile `paper` keys a layer on one side; the other side gives the same error, and keys
    on both sides would multiply it by kappa once more.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    expected = x @ weight
    key = draw_key(keys, width, MasterSecret.from_insecure_test_seed(seed))

    def error(dtype: torch.dtype, key_precision: KeyPrecision) -> float:
        layer = KeyedLinear(weight, None, key, IdentityKey(width), dtype=dtype, key_precision=key_precision)
        with torch.no_grad():
            y: Tensor = layer(x.to(dtype)).double()
        return float(torch.linalg.norm(y - expected) / torch.linalg.norm(expected))

    errors = {
        name: {"float32": error(DTYPES[name], "float32"), "same": error(DTYPES[name], "same")} for name in DTYPE_NAMES
    }
    return {"condition": key.condition_number, "errors": errors}
