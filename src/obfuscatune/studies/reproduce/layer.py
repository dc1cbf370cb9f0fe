"""One linear layer in the clear, as secret shares and under fully homomorphic encryption, in one run.

The three hide different things from different people, so the seconds are no ranking: shares need workers that do not
collude, encryption needs one worker and nobody's honesty. FHE is `concrete-ml-extensions` (TFHE), an optional extra;
its numbers are integers of 7 bits here, weights in the clear, which is the product that it offers.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.enclave.sharing.uniform import Uniform
from obfuscatune.enclave.sharing.workers import Workers
from obfuscatune.enclave.spawn import open_session
from obfuscatune.errors import ObfuscatuneError

ROUNDS = 5
FHE_EXTRA = "concrete-ml-extensions"
_LEVELS = 63  # of the numbers under FHE, on each side of 0
_COEFFICIENTS = 2048  # of one of its ciphertexts


def layer_seconds(rows: int, width: int, *, fhe: bool) -> list[dict[str, Any]]:
    """Return ``how``, ``seconds``, relative ``error`` (Frobenius) and ``rounds`` of ``[rows, width] [width, width]``.

    Args:
        fhe: whether FHE is measured too, once: it takes a minute.

    Raises:
        ObfuscatuneError: FHE is asked for and not there.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(width, width, generator=generator) / width**0.5
    truth = x.double() @ weight.double()
    found = [_row("float32 in the clear", lambda: x @ weight, truth)]
    with _shared(x, weight) as product:
        found.append(_row("shared, 6 primes", product, truth))
    if fhe:
        found.append(_row("FHE, 7 bits", _encrypted(x, weight), truth, rounds=1))
    return found


def _row(how: str, compute: Callable[[], Tensor], truth: Tensor, rounds: int = ROUNDS) -> dict[str, Any]:
    if rounds > 1:
        compute()  # warms up
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        y = compute()
        seconds.append(time.perf_counter() - started)
    error = ((y.double() - truth).norm() / truth.norm()).item()
    return {"how": how, "seconds": statistics.median(seconds), "error": error, "rounds": rounds}


@contextmanager
def _shared(x: Tensor, weight: Tensor) -> Iterator[Callable[[], Tensor]]:
    """The product by three processes on this machine, verified."""
    scheme = Scheme.make()
    sessions = [open_session("spawn", timeout=600, threads=1, device=None) for _ in scheme.points]
    for session in sessions:
        session.hello()
    workers = Workers(sessions, scheme, Uniform(), verify=True)
    with closing(workers):
        there = workers.define("layer", weight)
        yield lambda: workers.product(there, x, transpose=False)


def _encrypted(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Encryption of the rows, the product, and decryption; the keys are made before."""
    try:
        import concrete_ml_extensions as fhe
    except ImportError as error:
        raise ObfuscatuneError(
            f"{FHE_EXTRA} is not installed", hint="pip install '.[fhe]' in the source of obfuscatune"
        ) from error
    parameters = fhe.MatmulCryptoParameters.deserialize(fhe.default_params())
    secret, compression = fhe.create_private_key(parameters)
    scale_x, scale_w = (_LEVELS / tensor.abs().max() for tensor in (x, weight))
    rows, columns = ((t * s).round().long().numpy().astype("uint64") for t, s in ((x, scale_x), (weight, scale_w)))
    last = weight.shape[1] % _COEFFICIENTS or _COEFFICIENTS

    def compute() -> Tensor:
        product = fhe.matrix_multiplication(fhe.encrypt_matrix(secret, parameters, rows), columns, compression)
        y = fhe.decrypt_matrix(product, secret, parameters, last)
        return torch.tensor(y.astype("int64")).double() / (scale_x * scale_w)

    return compute


def fhe_version() -> str | None:
    """Version of the extra; None where it is not installed."""
    try:
        return version(FHE_EXTRA)
    except PackageNotFoundError:
        return None
