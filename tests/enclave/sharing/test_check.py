"""The check in the field: what is wrong by one bit is caught, whoever lies; and what is right never is."""

import pytest
import torch

from obfuscatune.enclave.sharing import reference
from obfuscatune.enclave.sharing.check import vectors_of
from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.protocol.residues import centred

from .shared_product import Product, seeded_uniform


def flips(n: int, p: int, seed: int) -> torch.Tensor:
    """What a flipped bit of a reply changes of the product's residue, times any Lagrange coefficient: not 0 mod p."""
    generator = torch.Generator().manual_seed(seed)
    bits = 1 << torch.randint(0, 8, (n,), generator=generator)
    signs = 1 - 2 * torch.randint(0, 2, (n,), generator=generator)
    found = centred(bits * signs * torch.tensor([3, -3, 1])[torch.randint(0, 3, (n,), generator=generator)], p)
    assert (found != 0).all()
    return found


def missed(count: int, trials: int, *, width: int = 64, each: int = 10_000) -> int:
    """How many single flipped bits, each in a row of its own, pass so many vectors for each prime."""
    scheme, uniform, found = Scheme.make(primes=7), seeded_uniform(), 0
    generator = torch.Generator().manual_seed(5)
    for batch in range(trials // each):
        l = batch % len(scheme.primes)  # noqa: E741
        p = scheme.primes[l]
        vectors = uniform.draw(scheme, count, width)[l]
        right = torch.randint(-(p // 2), p // 2 + 1, (each, width), generator=generator)
        wrong = right.clone()
        at = torch.randint(0, width, (each,), generator=generator)
        wrong[torch.arange(each), at] = centred(wrong[torch.arange(each), at] + flips(each, p, batch), p)
        images = reference.dots(right, vectors, p)
        found += int((reference.dots(wrong, vectors, p) == images).all(dim=1).sum())
    return found


def test_there_are_vectors_enough() -> None:
    for primes, count in ((6, 6), (7, 7)):
        scheme = Scheme.make(primes=primes)
        assert vectors_of(scheme) == count and min(scheme.primes) ** count >= 2**40 > min(scheme.primes) ** (count - 1)


def test_one_vector_alone_misses_some() -> None:
    """The control: the same trials with too few vectors."""
    assert missed(1, 80_000) > 200  # 1 / p of them, about 430


def test_of_a_million_flipped_bits_none_is_missed() -> None:
    assert missed(vectors_of(Scheme.make()), 1_000_000) == 0


@pytest.mark.parametrize("transpose", [False, True])
def test_one_bit_in_one_reply_of_one_worker(transpose: bool) -> None:
    product = Product.of(torch.randn(40, 24), Scheme.make(spares=1))
    rows = product.rows(torch.randn(9, 24 if transpose else 40), transpose=transpose)
    honest = product.replies(rows, transpose=transpose)
    generator = torch.Generator().manual_seed(1)
    for trial in range(300):
        worker = trial % 3
        replies = [reply.clone() for reply in honest]
        flat = replies[worker].view(-1)
        at = int(torch.randint(0, len(flat), (), generator=generator))
        flat[at] ^= -128 if trial % 8 == 7 else 1 << trial % 8
        assert product.decode(rows, replies, transpose=transpose) is None
        others = tuple(i for i in range(4) if i != worker)  # with the spare in the liar's place it is right
        assert product.decode(rows, replies, transpose=transpose, workers=others) is not None
    assert product.decode(rows, honest, transpose=transpose) is not None


def test_all_workers_together_cannot_lie() -> None:
    """Each adds the share of an error of their choice, so that the replies lie on one polynomial."""
    product = Product.of(torch.randn(40, 24), Scheme.make())
    rows = product.rows(torch.randn(9, 40))
    replies = product.replies(rows)
    for reply in replies:
        for plane, p in zip(reply, product.scheme.primes, strict=True):
            plane[4] = centred(plane[4].int() + 1, p)
    assert product.decode(rows, replies) is None


def test_without_vectors_nothing_is_checked() -> None:
    """The control: it is the vectors that catch it."""
    product = Product.of(torch.randn(40, 24), Scheme.make(), checks=0)
    rows = product.rows(torch.randn(9, 40))
    replies = product.replies(rows)
    replies[1][2, 3, 4] ^= 1
    assert product.decode(rows, replies) is not None


def test_after_a_fault_there_are_no_vectors() -> None:
    check = Product.of(torch.randn(8, 8), Scheme.make()).check
    check.discard()
    assert check.sides(transpose=False) is None
