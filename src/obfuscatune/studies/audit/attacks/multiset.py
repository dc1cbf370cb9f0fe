r"""A16, matching against permutations: neurons keep their biases and norms whatever their order.

Under ``W1* = R^T W1 P``, ``b1* = b1 P``, ``W2* = P^T W2 R'`` a neuron shows its bias, the norm of its column of W1
and of its row of W2. They are matched with a public base's, the nearest triple first. Then R follows by Procrustes,
and with it whole columns are matched, in turns.

Source: arXiv 2505.18332 for rows of activations; on weights, A16 in docs/security.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.studies.audit.algebra import matching, procrustes
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth
from obfuscatune.studies.audit.reference import Reference
from obfuscatune.studies.audit.view import WorkerView

_ROUNDS = 5


@dataclass(frozen=True, slots=True, repr=False)
class Order:
    """places: for each neuron of the base, where the worker has it ``[h]``. bias: the worker's ``[h]``."""

    places: Tensor
    bias: Tensor


def find_order(view: WorkerView, base: Reference, block: int) -> Order:
    """Match a block's neurons with the base's.

    Raises:
        NotApplicableError: the worker has no permuted neurons.
    """
    bias = view.segment(block, "up").tensors.get("up_bias")
    if bias is None:
        raise NotApplicableError("no neurons in another order cross: what is inside the MLP is in the enclave")
    up, down = view.weight(block, "up"), view.weight(block, "down")
    near_up, near_down = base.weight(block, "up"), base.weight(block, "down")
    here = torch.stack([bias.double(), up.norm(dim=0), down.norm(dim=1)])
    there = torch.stack([base.bias(block, "up"), near_up.norm(dim=0), near_down.norm(dim=1)])
    spread = there.std(dim=1, keepdim=True)
    places = matching(-torch.cdist((there / spread).mT, (here / spread).mT))
    for _ in range(_ROUNDS):
        into = procrustes(near_up.mT, up[:, places].mT).mT @ up
        out = down @ procrustes(near_down, down[places])
        places = matching(-torch.cdist(near_up.mT, into.mT).square() - torch.cdist(near_down, out).square())
    return Order(places, bias.double())


def _run(sample: Sample, knowledge: Knowledge) -> list[Order]:
    if not knowledge.profile.permute_mlp and not knowledge.profile.mix_rows:
        raise NotApplicableError("nothing is permuted")
    if knowledge.base is None:
        raise NotApplicableError("no base")
    return [find_order(sample.view, knowledge.base, block) for block in range(sample.view.blocks)]


def true_places(bias: Tensor, truth: Truth, block: int) -> Tensor:
    """Where the worker has each of the private model's neurons ``[h]``: its biases, sorted, tell."""
    places = torch.empty(len(bias), dtype=torch.long)
    places[truth.private.bias(block, "up").argsort()] = bias.argsort()
    return places


def _score(guess: list[Order], truth: Truth) -> Score:
    right = [
        (order.places == true_places(order.bias, truth, block)).double().mean().item()
        for block, order in enumerate(guess)
    ]
    return Score(sum(right) / len(right), 1 / len(guess[0].places))


ATTACK = Attack(
    id="A16",
    title="matching of neurons",
    needs="B",
    source="arXiv 2505.18332; A16 in docs/security.md",
    metric="share of neurons put into their place",
    chance="one over their number",
    run=_run,
    score=_score,
    fires_on="balanced",
    fires_at=0.9,
    by_tokens=False,
)
