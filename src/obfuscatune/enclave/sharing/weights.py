"""The shares of a weight: made once, and anew with every version of it, because equal masks would show a difference."""

import torch
from torch import Tensor

from obfuscatune.enclave.sharing import coding
from obfuscatune.enclave.sharing.fixed import Fixed
from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.enclave.sharing.uniform import Uniform


def weight_shares(fixed: Fixed, scheme: Scheme, uniform: Uniform) -> list[Tensor]:
    """Return each worker's int8 ``[L, in, out]``: its share, or with open weights the residues themselves."""
    rows, columns = fixed.rows, fixed.columns
    rules = None
    if scheme.shares_weights:
        drawn = torch.stack([uniform.draw(scheme, *rows.shape) for _ in range(scheme.threshold)])
    else:
        drawn = torch.zeros(scheme.threshold, len(scheme.primes), *rows.shape, dtype=torch.int8)
        rules = (((1, *[0] * scheme.threshold),),) * len(scheme.primes)
    none = torch.zeros(len(scheme.primes), 0, rows.shape[1], dtype=torch.int16)
    shares = coding.encode(scheme, rows, columns, drawn, most=None, vectors=none, weights=rules).shares
    return shares if scheme.shares_weights else [shares[-1]] * len(scheme.points)
