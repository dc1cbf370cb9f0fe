"""What one worker sees is uniform whatever the secret is; and each way to get that wrong is caught by the same test."""

import os
import random
from collections.abc import Callable

import torch
from torch import Tensor

from obfuscatune.enclave.sharing import coding
from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.enclave.sharing.uniform import Uniform

from .shared_product import Product, seeded_uniform

CALLS, ROWS, WIDTH = 10_000, 2, 32
SIGMAS = 5.0


def deviation(values: Tensor, cells: int) -> float:
    """(chi-square - df) / sqrt(2 df) of integers 0 .. cells - 1 against the uniform law: standard normal, nearly."""
    counts = torch.bincount(values.reshape(-1), minlength=cells).double()
    expected = values.numel() / cells
    assert expected >= 2 and len(counts) == cells
    df = cells - 1
    return (((counts - expected) ** 2 / expected).sum().item() - df) / (2 * df) ** 0.5


def deviation_by_place(values: Tensor, cells: int) -> float:
    """The same of ``[calls, ..]``, place by place: each has its own secret, over which a bias would average out."""
    places = [deviation(column, cells) for column in values.flatten(1).T]
    return sum(places) / len(places) ** 0.5


def deviations(view: Tensor, primes: tuple[int, ...]) -> dict[str, float]:
    """Of residues ``[calls, L, rows, width]``: each alone, and pairs of residues, of rows, and of calls."""
    found = {}
    up = [view[:, i].long() + p // 2 for i, p in enumerate(primes)]
    for i, p in enumerate(primes):
        q = primes[(i + 1) % len(primes)]
        found[f"residue {p}"] = deviation_by_place(up[i], p)
        found[f"residues {p}, {q}"] = deviation(up[i] * q + up[(i + 1) % len(primes)], p * q)
        found[f"rows {p}"] = deviation(up[i][:, 0] * p + up[i][:, 1], p * p)
        found[f"calls {p}"] = deviation(up[i][:-1] * p + up[i][1:], p * p)
    return found


def views(draw: Callable[[Scheme], Tensor], scheme: Scheme) -> list[Tensor]:
    """What each worker sees of so many calls with the same rows."""
    x = torch.linspace(-3, 5, ROWS * WIDTH).view(ROWS, WIDTH)
    ones, none = torch.ones(WIDTH, dtype=torch.float64), torch.zeros(len(scheme.primes), 0, WIDTH, dtype=torch.int16)
    calls = [coding.encode(scheme, x, ones, draw(scheme), most=1e6, vectors=none).shares for _ in range(CALLS)]
    return [torch.stack(seen) for seen in zip(*calls, strict=True)]


def drawn(uniform: Uniform) -> Callable[[Scheme], Tensor]:
    return lambda scheme: uniform.drawn(scheme, (ROWS, WIDTH))[1]


SCHEME = Scheme((251, 227, 83), (1, 2, 3))


def test_each_view_is_uniform() -> None:
    for number, view in enumerate(views(drawn(seeded_uniform()), SCHEME)):
        for what, found in deviations(view, SCHEME.primes).items():
            assert abs(found) < SIGMAS, f"worker {number}, {what}"


def test_a_biased_draw_is_caught() -> None:
    # The bias of 127 is small: its deviation is about 10 +- 1.2. Of the system's generator one run in thirty missed it.
    drawing = random.Random(0)

    def biased(scheme: Scheme) -> Tensor:
        planes = [
            torch.frombuffer(bytearray(drawing.randbytes(ROWS * WIDTH)), dtype=torch.uint8).long() % p - p // 2
            for p in scheme.primes
        ]
        return torch.stack(planes).to(torch.int8).view(1, -1, ROWS, WIDTH)

    for view in views(biased, SCHEME):
        found = deviations(view, SCHEME.primes)
        alone = {p: found[f"residue {p}"] for p in SCHEME.primes}
        assert all(value > 1.5 * SIGMAS for value in alone.values()), alone


def test_a_mask_that_is_used_again_is_caught() -> None:
    uniform, kept = seeded_uniform(), []

    def reused(scheme: Scheme) -> Tensor:
        if len(kept) % 2 == 0:  # each mask for two calls
            kept.append(drawn(uniform)(scheme))
            return kept[-1]
        kept.append(kept[-1])
        return kept[-1]

    for view in views(reused, SCHEME):
        half = deviations(view[::2], SCHEME.primes)  # one call of each two shows nothing
        assert all(abs(value) < SIGMAS for value in half.values())
        found = deviations(view, SCHEME.primes)
        assert all(found[f"calls {p}"] > 10 * SIGMAS for p in SCHEME.primes)


def test_two_pooled_workers_are_caught() -> None:
    first, second, _ = views(drawn(seeded_uniform()), SCHEME)
    for i, p in enumerate(SCHEME.primes):
        joint = (first[:, i].long() + p // 2) * p + second[:, i].long() + p // 2
        assert deviation(joint, p * p) > 10 * SIGMAS


def test_two_pooled_workers_have_rows_and_weights_and_one_has_not() -> None:
    """The control that must fire: any two recover all of it. From one, the same arithmetic gives noise."""
    scheme = Scheme.make()
    product = Product.of(torch.randn(20, 12), scheme)
    x = torch.randn(6, 20)
    rows = product.rows(x)
    truth = coding.encode(
        scheme,
        x,
        product.integers.forward.before,
        torch.zeros(1, 6, 6, 20, dtype=torch.int8),
        most=product.integers.forward.most,
        vectors=torch.zeros(6, 0, 20, dtype=torch.int16),
        weights=(((1, 0),),) * 6,
    ).shares[-1]
    for i, p in enumerate(scheme.primes):
        a, b, c = (share[i].long() for share in rows.shares)
        for recovered in (2 * a - b, (3 * a - c) * pow(2, -1, p), 3 * b - 2 * c):
            assert ((recovered - truth[i]) % p == 0).all()
        assert ((a - truth[i]) % p == 0).double().mean() < 0.1
        v, w, _ = (worker.weight["weight"][i].long() for worker in product.workers)
        recovered = (2 * v - w) * (scheme.modulus // p)  # what was shared is W (M / p)^-1
        assert ((recovered - product.integers.integers.long()) % p == 0).all()


def test_masks_are_new_in_each_call_and_in_a_forked_process() -> None:
    uniform = Uniform()
    first, second = uniform.draw(SCHEME, 64), uniform.draw(SCHEME, 64)
    assert not torch.equal(first, second)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, uniform.draw(SCHEME, 64).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 3 * 64)
    assert len(theirs) == 3 * 64 and theirs != uniform.draw(SCHEME, 64).numpy().tobytes()
