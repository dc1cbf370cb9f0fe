r"""A16, matching against permutations: neurons keep their biases and norms whatever their order.

Under ``W1* = R^T W1 P``, ``b1* = b1 P``, ``W2* = P^T W2 R'`` a neuron shows its bias, the norm of its column of W1
and of its row of W2. They are matched with a public base's, the nearest triple first. Then R follows by Procrustes,
and with it whole columns are matched, in turns.

A gated MLP has ``[Wg|Wu]* = R^T [Wg P|Wu D P]`` and ``Wd* = (D P)^-1 Wd R'``: the gate's columns keep their norms and
``g^T (Wg Wg^T)^k g``; of the others, the product of the norms of a neuron's column and row, and the angle between its
two columns, are free of D. With R known, D is read off the columns.

Source: arXiv 2505.18332 for rows of activations; on weights, A16 in docs/security.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obfuscatune.studies.audit.algebra import matching, procrustes
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth
from obfuscatune.studies.audit.reference import Reference
from obfuscatune.studies.audit.view import WorkerView

_ROUNDS = 5
_POWERS = (1, 2, 3)  # k above; the fourth tells nothing that these do not


@dataclass(frozen=True, slots=True, repr=False)
class Order:
    """What was found of a block's neurons.

    Attributes:
        places: for each neuron of the base, where the worker has it ``[h]``. scale: by which its column of W1, of the
            ungated half, is larger there ``[h]``. columns: of the worker, ``W1`` or ``Wg`` ``[d, h]``.
    """

    places: Tensor
    scale: Tensor
    columns: Tensor

    def first(self, weight: Tensor) -> Tensor:
        """The worker's W1, or ``[Wg|Wu]``, in the base's order and scale."""
        *gate, up = weight.split(len(self.places), dim=1)  # type: ignore[no-untyped-call]
        return torch.cat([*(part[:, self.places] for part in gate), up[:, self.places] / self.scale], dim=1)

    def last(self, weight: Tensor) -> Tensor:
        """The worker's W2 likewise."""
        return weight[self.places] * self.scale[:, None]


def find_order(view: WorkerView, base: Reference, block: int) -> Order:
    """Match a block's neurons with the base's.

    Raises:
        NotApplicableError: the worker has no permuted neurons.
    """
    segment = view.segment(block, "up")
    if not segment.whole:
        raise NotApplicableError("no neurons in another order cross: what is inside the MLP is in the enclave")
    here, there = (
        (segment.weight("up"), segment.weight("down")),
        (base.weight(block, "up"), base.weight(block, "down")),
    )
    if here[0].shape[1] > here[1].shape[0]:
        return _find_gated(here, there)
    (up, down), (near_up, near_down) = here, there
    bias = segment.bias("up")
    own = torch.stack([up.norm(dim=0), down.norm(dim=1), *([] if bias is None else [bias])])
    near = torch.stack(
        [near_up.norm(dim=0), near_down.norm(dim=1), *([] if bias is None else [base.bias(block, "up")])]
    )
    places = _match(near, own)
    for _ in range(_ROUNDS):
        into = procrustes(near_up.mT, up[:, places].mT).mT @ up
        out = down @ procrustes(near_down, down[places])
        places = matching(-torch.cdist(near_up.mT, into.mT).square() - torch.cdist(near_down, out).square())
    return Order(places, torch.ones(len(places), dtype=up.dtype), up)


def _find_gated(here: tuple[Tensor, Tensor], there: tuple[Tensor, Tensor]) -> Order:
    (gate, up), (near_gate, near_up) = (pair[0].chunk(2, dim=1) for pair in (here, there))
    places = _match(_features(near_gate, near_up, there[1]), _features(gate, up, here[1]))
    turn = procrustes(near_gate.mT, gate[:, places].mT).mT
    for _ in range(_ROUNDS):
        cosines = _cosines(near_gate, turn @ gate) + _cosines(near_up, turn @ up).abs()
        places = matching(cosines)
        turn = procrustes(near_gate.mT, gate[:, places].mT).mT
    undone = (turn @ up)[:, places]
    scale = undone.square().sum(dim=0) / (undone * near_up).sum(dim=0)
    return Order(places, scale, gate)


def _features(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What neither a rotation of the input nor sizes of neurons change ``[n, h]``."""
    found, energies = gate, [gate.square().sum(dim=0)]
    for _ in _POWERS:
        found = gate @ (gate.mT @ found)
        found = found / found.norm()
        energies.append((gate * found).sum(dim=0))
    angle = (normalize(gate, dim=0) * normalize(up, dim=0)).sum(dim=0).abs()
    return torch.stack([*energies, up.norm(dim=0) * down.norm(dim=1), angle])


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return normalize(a, dim=0).mT @ normalize(b, dim=0)


def _match(near: Tensor, own: Tensor) -> Tensor:
    """The worker's place of each neuron of the base by their features ``[n, h]``, in units of the base's spread."""
    spread = near.std(dim=1, keepdim=True)
    return matching(-torch.cdist((near / spread).mT, (own / spread).mT))


def _run(sample: Sample, knowledge: Knowledge) -> list[Order]:
    if not knowledge.profile.permute_mlp and not knowledge.profile.mix_rows:
        raise NotApplicableError("nothing is permuted")
    if knowledge.base is None:
        raise NotApplicableError("no base")
    return [find_order(sample.view, knowledge.base, block) for block in range(sample.view.blocks)]


def true_places(order: Order, truth: Truth, block: int) -> Tensor:
    """Where the worker has each of the private model's neurons ``[h]``: its columns tell, the key undone."""
    undone = truth.keys[block, "mlp in"] @ order.columns
    plain = truth.private.weight(block, "up")[:, : undone.shape[1]]
    return torch.cdist(plain.mT, undone.mT).argmin(dim=1)


def _score(guess: list[Order], truth: Truth) -> Score:
    right = [
        (order.places == true_places(order, truth, block)).double().mean().item() for block, order in enumerate(guess)
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
