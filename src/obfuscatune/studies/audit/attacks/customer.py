r"""A12, a colluding customer: what he sent in his own session is a codebook for another one.

Sessions have keys of their own, but one model. From the weights as they were handed over in each follows the map
between the two keys, exactly (R3): R1^-1 R2 = (R1^-1 W)(R2^-1 W)^+ where they are keyed on one side; from the
products of heads (A5) where heads have keys; from singular vectors where both sides are keyed, their signs being
those of the rows' means and third moments. The customer's rows, brought over, are then looked up.

Source: R3 in docs/security.md.
"""

import torch
from torch import Tensor

from obfuscatune.studies.audit.algebra import centred, nearest
from obfuscatune.studies.audit.attack import Attack, Customer, Knowledge, NotApplicableError, Sample, top1
from obfuscatune.studies.audit.attacks.head_gauge import align, products
from obfuscatune.studies.audit.text import FIRST, FIRST_WEIGHT, positions, token_rows
from obfuscatune.studies.audit.view import WorkerView


def relative_key(first: WorkerView, second: WorkerView, knowledge: Knowledge) -> Tensor:
    """Return T ``[d, d]`` that brings the first session's rows before q, k, v into the second's key."""
    here, there = first.weight(*FIRST_WEIGHT), second.weight(*FIRST_WEIGHT)
    if knowledge.profile.attention == "worker" and knowledge.profile.head_keys:
        shape = knowledge.design.shape
        key = align(products(here, shape), products(there, shape))
        means = [token_rows(view, *FIRST).mean(dim=0) for view in (first, second)]
        return key if means[0] @ key @ means[1] > 0 else -key
    if knowledge.profile.inner_keys == "identity":
        return here @ torch.linalg.pinv(there)  # type: ignore[no-any-return]
    u, v = (torch.linalg.svd(weight, full_matrices=False).U for weight in (here, there))
    odd = torch.stack([_odd(first, u), _odd(second, v)]).prod(dim=0).sum(dim=0)
    return (u * torch.where(odd < 0, -1.0, 1.0)) @ v.mT  # type: ignore[no-any-return]


def _odd(view: WorkerView, directions: Tensor) -> Tensor:
    """Means and third moments ``[2, d]`` of rows along directions, in units of their spread."""
    along = token_rows(view, *FIRST) @ directions
    spread = along.std(dim=0).clamp_min(1e-30)
    return torch.stack([along.mean(dim=0) / spread, (centred(along) / spread).pow(3).mean(dim=0)])


def _run(sample: Sample, knowledge: Knowledge) -> Tensor:
    if knowledge.customer is None:
        raise NotApplicableError("no customer's session")
    length = knowledge.corpus.shape[1]
    codebook, tokens, places = _codebook(knowledge.customer)
    wanted, at = token_rows(sample.target, *FIRST), positions(sample.target, FIRST[1])
    moved = codebook @ relative_key(knowledge.customer.view, sample.target, knowledge)
    # Rows of one position are alike whatever the token is: that part is taken away.
    means = torch.zeros(length, moved.shape[1], dtype=moved.dtype).index_add(0, places, moved)
    means = means / places.bincount(minlength=length).clamp_min(1)[:, None]
    return tokens[nearest(wanted - means[at], moved - means[places])]


def _codebook(customer: Customer) -> tuple[Tensor, Tensor, Tensor]:
    """The customer's rows ``[n, d]``, their tokens and positions."""
    tokens = torch.cat([batch.flatten() for batch in customer.batches])
    return token_rows(customer.view, *FIRST), tokens, positions(customer.view, FIRST[1])


ATTACK = Attack(
    id="A12",
    title="colluding customer",
    needs="Q",
    source="R3 in docs/security.md",
    metric="share of the target's tokens",
    chance="the most frequent token's share",
    run=_run,
    score=lambda guess, truth: top1(guess, truth.target_tokens),
    fires_on="balanced",
    fires_at=0.5,
    by_tokens=False,
)
