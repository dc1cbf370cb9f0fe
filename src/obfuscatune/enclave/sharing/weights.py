"""The shares of a weight: made once, and anew with every version of it, because equal masks would show a difference."""

import torch
from torch import Tensor

from obfuscatune.enclave.sharing import coding
from obfuscatune.enclave.sharing.fixed import Fixed
from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.enclave.sharing.uniform import Uniform


def weight_shares(fixed: Fixed, scheme: Scheme, uniform: Uniform) -> tuple[list[bytes], list[Tensor]]:
    """Return the seeds of the first shares, and each worker's int8 ``[L, in, out]``: its share.

    With open weights there are no seeds, and the residues themselves are what each worker gets. Modulo p they are
    ``W (M / p)^-1``, so that the replies are what the lift of the Chinese remainder theorem adds up.
    """
    rows, columns = fixed.rows, fixed.columns
    rules, seeds = coding.weight_rules(scheme), list[bytes]()
    if scheme.shares_weights:
        seeds, drawn = uniform.drawn(scheme, rows.shape)
    else:
        drawn = torch.zeros(scheme.threshold, len(scheme.primes), *rows.shape, dtype=torch.int8)
    none = torch.zeros(len(scheme.primes), 0, rows.shape[1], dtype=torch.int16)
    shares = coding.encode(scheme, rows, columns, drawn, most=None, vectors=none, weights=rules).shares
    return seeds, shares if scheme.shares_weights else [shares[-1]] * len(scheme.points)
