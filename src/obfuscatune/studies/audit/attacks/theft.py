r"""A25, functional theft: a body in one unknown rotation is a working body.

Linking (A24) brings the worker's blocks into one key; where one key covers all, they are in it at once. In the
coordinates of the first stream, r the residual, n(r) = r / rms(r), T_j the composed relative keys and f_j a sublayer
as the worker has it,

    r <- r + (f_j(n(r) T_j) Q_j + c_j) T_j+1^-1

is the private model's body, rotated. Its weights are frozen. What the enclave kept is made anew: linking gives the
scale of each row too, and so the first residual itself, which is a row of a token's, plus one of its position where
positions are embedded. A
customer knows the tokens of his own session; so he solves for their rows, and trains those of other tokens, a d x d
map before a head tied to them, and constants, on public text. The last MLP's output meets no other stream, so its
relative key is trained too. Beside it a model of the same size is trained from nothing with the same text.

Without a customer, all embeddings are to be trained: at d = 128 and some 10^5 tokens that is no better than from
nothing.

Source: R8 in docs/security.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from obfuscatune.protocol.norms import rms_rows
from obfuscatune.studies.audit.attack import Attack, Customer, Knowledge, NotApplicableError, Sample, Score, Truth
from obfuscatune.studies.audit.attacks.linking import Link, is_orthogonal, junctions, link_all
from obfuscatune.studies.audit.reference import Design
from obfuscatune.studies.audit.view import ROLES, WorkerView
from obfuscatune.worker.attention import attend, rotate
from obfuscatune.worker.segments import ACTIVATIONS

STEPS = 150
BATCH = 16
# Best of a few, for the stolen model and for the one from nothing alike; that of embeddings in units of their size.
_RATE, _EMBEDDING_RATE = 5e-3, 0.16
_DRAWN = 0.5  # size of embeddings that are drawn
_SOLVER_ROUNDS = 100


@dataclass(frozen=True, slots=True, repr=False)
class Stolen:
    """The stolen model, and one from nothing that was trained on the same text."""

    stolen: "Body"
    scratch: "Body"


@dataclass(frozen=True, slots=True, repr=False)
class Blocks:
    """Weights ``[in, out]`` and biases by block and role; by sublayer, the maps of the residual into it and back."""

    weights: list[dict[str, Tensor]]
    biases: list[dict[str, Tensor]]
    into: list[Tensor]
    back: list[Tensor]


@dataclass(frozen=True, slots=True, repr=False)
class Tables:
    """Embeddings of tokens ``[vocab, d]`` and positions ``[T, d]``; ``solved`` tokens ``[vocab]`` are not trained."""

    words: Tensor
    positions: Tensor
    solved: Tensor


class Body(nn.Module):
    """A model of a known design. frozen: whether the blocks' weights are; the last map back is trained then."""

    def __init__(self, blocks: Blocks, tables: Tables, design: Design, *, frozen: bool) -> None:
        super().__init__()
        self._design, last = design, len(blocks.back) - 1
        self.weights = _parameters([part[role] for part in blocks.weights for role in ROLES], not frozen)
        self.biases = _parameters([part[role] for part in blocks.biases for role in ROLES], True)
        self.into = _parameters(blocks.into, False)
        self.back = _parameters(blocks.back, False)
        self.back[last].requires_grad_(frozen)
        self.words, self.places = nn.Parameter(tables.words.float()), nn.Parameter(tables.positions.float())
        self.places.requires_grad_(design.embedded_positions and not tables.solved.any())
        self.words.register_hook(lambda grad: grad.masked_fill(tables.solved[:, None], 0.0))  # type: ignore[no-untyped-call]
        self.head = nn.Parameter(torch.eye(tables.words.shape[1]) * (1.0 if tables.solved.any() else 0.1))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[B, T, vocab]`` of ids ``[B, T]``."""
        return self.hidden(ids) @ self.head @ self.words.mT

    def hidden(self, ids: Tensor) -> Tensor:
        """The normalized residual after the last block ``[B, T, d]``."""
        r = self.words[ids] + self.places[: ids.shape[1]]
        for i, (into, back) in enumerate(zip(self.into, self.back, strict=True)):
            sublayer = self._mlp if i % 2 else self._attention
            r = r + sublayer(i // 2, rms_rows(r, self._design.eps) @ into) @ back
        return rms_rows(r, self._design.eps)

    def _linear(self, block: int, role: str, x: Tensor) -> Tensor:
        place = block * len(ROLES) + ROLES.index(role)
        return x @ self.weights[place] + self.biases[place]  # type: ignore[no-any-return]

    def _attention(self, block: int, x: Tensor) -> Tensor:
        shape, rotary = self._design.shape, self._design.angles(x.shape[1])
        split = (shape.heads, shape.kv_heads, shape.kv_heads)
        heads = self._linear(block, "qkv", x).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)  # type: ignore[no-untyped-call]
        q, k, v = heads.split(split, dim=1)
        if rotary is not None:
            cos, sin = (part.float() for part in rotary)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        heads = attend(q, k, v, mask=None, scale=shape.scale, softcap=shape.softcap)
        return self._linear(block, "out", heads.transpose(1, 2).flatten(2))

    def _mlp(self, block: int, x: Tensor) -> Tensor:
        activation, hidden = ACTIVATIONS[self._design.activation], self._linear(block, "up", x)
        if self._design.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return self._linear(block, "down", activation(gate) * up)
        return self._linear(block, "down", activation(hidden))


def _parameters(tensors: Sequence[Tensor], trained: bool) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(tensor.float(), requires_grad=trained) for tensor in tensors)


def assemble(view: WorkerView, links: list[Link] | None) -> Blocks:
    """The worker's blocks in the key of the first stream. links: None takes all keys of the residual for one."""
    eye = torch.eye(view.weight(0, "qkv").shape[0], dtype=torch.float64)
    into, back, constants = [eye], [], []
    for i in range(len(junctions(view.blocks))):
        carried, joined, constant = (eye, eye, 0 * eye[0]) if links is None else _maps(links[i])
        into.append(into[-1] @ carried)
        back.append(joined @ torch.linalg.inv(into[-1]))
        constants.append(constant @ torch.linalg.pinv(joined, rtol=1e-3))
    one_key = links is None or all(torch.equal(found.joined, eye) for found in links)
    back.append(eye if one_key else 0 * eye)
    weights = [{role: view.weight(block, role) for role in ROLES} for block in range(view.blocks)]
    biases = [{role: _bias(view, i, role, weight) for role, weight in part.items()} for i, part in enumerate(weights)]
    for i, constant in enumerate(constants):
        biases[i // 2]["down" if i % 2 else "out"] += constant
    return Blocks(weights, biases, into, back)


def _maps(found: Link) -> tuple[Tensor, Tensor, Tensor]:
    return found.carried, found.joined, found.constant


def _bias(view: WorkerView, block: int, role: str, weight: Tensor) -> Tensor:
    """The keyed bias where the worker adds it, else nothing."""
    bias = view.segment(block, role).bias(role)
    return weight.new_zeros(weight.shape[1]) if bias is None else bias.clone()


def solve_tables(customer: Customer, link: Link, sizes: tuple[int, int], *, embedded_positions: bool) -> Tables:
    """Rows of tokens and positions from a session of known text, linked at its first junction.

    sizes: of both tables. embedded_positions: whether positions have rows; else these are zero.
    Rows of tokens that do not occur are drawn like the others.
    """
    tokens = torch.cat([batch.flatten() for batch in customer.batches])
    places = torch.cat([torch.arange(batch.shape[1]).repeat(len(batch)) for batch in customer.batches])
    view = customer.view
    residual = link.residuals(view.rows(*link.first), view.rows(*link.added), view.rows(*link.last))
    counts, occurring = tokens.bincount(minlength=sizes[0]), places.bincount(minlength=sizes[1])
    positions = residual.new_zeros(sizes[1], residual.shape[1])
    # Alternating least squares of a sum of two rows: means of what the other leaves.
    words = _mean_by(tokens, residual, counts)
    for _ in range(_SOLVER_ROUNDS if embedded_positions else 0):
        words = _mean_by(tokens, residual - positions[places], counts)
        positions = _mean_by(places, residual - words[tokens], occurring)
    seen = counts > 0
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(words.shape, generator=generator).double() * words[seen].std(dim=0) + words[seen].mean(dim=0)
    return Tables(torch.where(seen[:, None], words, drawn), positions, seen)


def _mean_by(index: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add(0, index, rows)
    return sums / counts.clamp_min(1)[:, None]


def drawn_tables(sizes: tuple[int, int], width: int, *, embedded_positions: bool) -> Tables:
    """Random embeddings, all of them to be trained; zeros for positions that have none."""
    generator = torch.Generator().manual_seed(0)
    words, positions = (torch.randn(size, width, generator=generator) * _DRAWN for size in sizes)
    return Tables(
        words, positions / 5 if embedded_positions else 0 * positions, torch.zeros(sizes[0], dtype=torch.bool)
    )


def from_nothing(like: Blocks) -> Blocks:
    """Random weights of the same sizes."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"qkv": 0.02, "up": 0.02, "out": 0.008, "down": 0.008}
    weights = [
        {role: torch.randn(part[role].shape, generator=generator) * size for role, size in sizes.items()}
        for part in like.weights
    ]
    biases = [{role: torch.zeros(bias.shape) for role, bias in part.items()} for part in like.biases]
    eyes = [torch.eye(len(part)) for part in like.into]
    return Blocks(weights, biases, eyes, eyes)


def train(model: Body, rows: Tensor, steps: int = STEPS) -> Body:
    """Train what is not frozen on rows of tokens ``[n, T]``."""
    generator = torch.Generator().manual_seed(0)
    embeddings = [part for part in (model.words, model.places) if part.requires_grad]
    known = {id(part) for part in embeddings}
    others = [part for part in model.parameters() if part.requires_grad and id(part) not in known]
    rate = _EMBEDDING_RATE * model.words.detach().std().item()
    groups = [{"params": embeddings, "lr": rate}, {"params": others, "lr": _RATE}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[rate, _RATE], total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        ids = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        loss(model(ids), ids).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([*embeddings, *others], 1.0)
        optimizer.step()
        schedule.step()
    return model


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean of next tokens' cross-entropy."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _run(sample: Sample, knowledge: Knowledge) -> Stolen:
    customer = _customer(knowledge)
    if customer.view.mixed:
        return _steal(customer.view, None, knowledge)
    return _steal(customer.view, link_all(customer.view, orthogonal=is_orthogonal(knowledge.profile)), knowledge)


def _without_links(sample: Sample, knowledge: Knowledge) -> Stolen:
    return _steal(_customer(knowledge).view, None, knowledge)


def _customer(knowledge: Knowledge) -> Customer:
    if knowledge.customer is None:
        raise NotApplicableError("no customer's session")
    return knowledge.customer


def _steal(view: WorkerView, links: list[Link] | None, knowledge: Knowledge) -> Stolen:
    rows, design = knowledge.library, knowledge.design
    places = design.embedded_positions
    blocks, sizes = assemble(view, links), (knowledge.vocabulary, rows.shape[1])
    drawn = drawn_tables(sizes, len(blocks.into[0]), embedded_positions=places)
    tables = drawn
    if links is not None:
        tables = solve_tables(_customer(knowledge), links[0], sizes, embedded_positions=places)
    stolen = train(Body(blocks, tables, design, frozen=True), rows)
    if "from nothing" not in knowledge.cache:
        scratch = Body(from_nothing(blocks), drawn, design, frozen=False)
        knowledge.cache["from nothing"] = train(scratch, rows)
    return Stolen(stolen, knowledge.cache["from nothing"])


_MOST_NATS = 100.0  # a body of noise can be surer of a wrong token than a float64 holds


@torch.no_grad()
def _score(guess: Stolen, truth: Truth) -> Score:
    ids = truth.target_tokens.view(truth.target_shape)
    stolen, scratch = loss(guess.stolen(ids), ids).item(), loss(guess.scratch(ids), ids).item()
    private = loss(truth.private.logits(ids), ids).item()
    if scratch <= private:
        raise NotApplicableError("the private model is no better than one trained from nothing on the public text")
    perplexity = math.exp(min(stolen, _MOST_NATS))
    return Score(min(1.0, max(0.0, (scratch - stolen) / (scratch - private))), 0.0, perplexity)


ATTACK = Attack(
    id="A25",
    title="functional theft",
    needs="Q",
    source="R8 in docs/security.md",
    metric="share of the way, in log perplexity, from a model trained from nothing on the same text to the private one",
    chance="0: no better than from nothing",
    run=_run,
    score=_score,
    sham=_without_links,
    fires_on="balanced",
    fires_at=0.3,
    by_tokens=False,
    largest=4,
)
