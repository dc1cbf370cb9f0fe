r"""A10, sequential inversion: once the key of a stream is known, its text is found token by token.

    x_t = F(tokens before t, token t)

The rows that go into the first MLP depend on the token and on all before it. With the tokens before it known, every
next token is tried in the base, and the one whose row is nearest is kept: first with the attention's mean output on
public text, then the best of these exactly. The key is that of known text (A11).

Source: Nikolaou et al., arXiv 2510.15511 (SipIt), whose order of candidates this is.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth, top1
from obfuscatune.studies.audit.attacks.known_text import fit_stream
from obfuscatune.studies.audit.reference import Reference
from obfuscatune.studies.audit.text import length_of, table, token_rows
from obfuscatune.worker.attention import rotate

_PLACE = (0, "mlp in")
_CANDIDATES = 64


class _FirstAttention:
    """The base's first attention, one more token at a time: queries, keys and values are tables."""

    def __init__(self, knowledge: Knowledge, base: Reference) -> None:
        self._design, self._base = knowledge.design, base
        rows = table(knowledge, base.first_rows, "first rows of the base")
        weight, bias = base.weight(0, "qkv").float(), base.bias(0, "qkv").float()
        self._out, self._bias = base.weight(0, "out").float(), base.bias(0, "out").float()
        self._rows, self._qkv = rows, (weight, bias)
        words, places = base.embeddings()
        self._words, self._places = words.float(), places.float()
        self._mean = knowledge.base_streams()[0, "attention out"].float()
        self._mean = self._mean.view(-1, len(rows), self._mean.shape[1]).mean(dim=0)
        self._seen: list[tuple[Tensor, Tensor]] = []  # keys and values ``[B, H, dh]`` of each token so far

    def shortlist(self, wanted: Tensor) -> Tensor:
        """Return likely next tokens ``[B, c]`` of rows ``[B, d]``, whatever came before."""
        place = len(self._seen)
        rows = self._after(self._words + self._places[place], self._mean[place])
        return (wanted @ normalize(rows, dim=1).mT).topk(_CANDIDATES, dim=1).indices

    def rows(self, tokens: Tensor) -> Tensor:
        """Return what goes into the MLP ``[B, c, d]``, of candidates ``[B, c]`` for the next token."""
        place = len(self._seen)
        q, *own = self._project(tokens)  # [B, c, H, dh]
        logits = [(q * own[0]).sum(dim=3, keepdim=True)]
        v = None
        if self._seen:
            k, v = (torch.stack(parts, dim=2) for parts in zip(*self._seen, strict=True))  # [B, H, t, dh]
            logits.append((q.transpose(1, 2) @ k.mT).transpose(1, 2))
        weights = (torch.cat(logits, dim=3) * self._design.shape.scale).softmax(dim=3)
        heads = weights[..., :1] * own[1]
        if v is not None:
            heads = heads + (weights[..., 1:].transpose(1, 2) @ v).transpose(1, 2)
        return self._after(self._words[tokens] + self._places[place], heads.flatten(2) @ self._out)

    def append(self, tokens: Tensor) -> None:
        """Take tokens ``[B]`` for the next ones."""
        _, k, v = self._project(tokens[:, None])
        self._seen.append((k[:, 0], v[:, 0]))

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q and k, and v, of candidates ``[B, c]`` at the next position, ``[B, c, H, dh]``."""
        (weight, bias), shape, place = self._qkv, self._design.shape, len(self._seen)
        rows = (self._rows[place, tokens] @ weight + bias).unflatten(2, (-1, shape.head_dim))  # type: ignore[no-untyped-call]
        q, k, v = rows.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=2)
        if self._design.rotary is not None:
            cos, sin = (part[:, place : place + 1].to(q.dtype) for part in self._design.rotary)
            q, k = (rotate(part.flatten(0, 1)[:, :, None], cos, sin)[:, :, 0].view(part.shape) for part in (q, k))
        share = shape.heads // shape.kv_heads
        return q, k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)

    def _after(self, residual: Tensor, attended: Tensor) -> Tensor:
        return self._base.normed(0, "up", (residual + attended + self._bias).double()).float()


def _run(sample: Sample, knowledge: Knowledge) -> Tensor:
    base = knowledge.base
    if base is None:
        raise NotApplicableError("no base")
    rows = fit_stream(sample, knowledge, *_PLACE).read(token_rows(sample.target, *_PLACE))
    texts = normalize(rows, dim=1).float().view(-1, length_of(sample.target), rows.shape[1])
    model, tokens = _FirstAttention(knowledge, base), []
    for wanted in texts.unbind(dim=1):
        candidates = model.shortlist(wanted)
        tried = normalize(model.rows(candidates), dim=2)
        best = torch.einsum("bcd,bd->bc", tried, wanted).argmax(dim=1, keepdim=True)
        tokens.append(candidates.gather(1, best).squeeze(1))
        model.append(tokens[-1])
    return torch.stack(tokens, dim=1).flatten()


def _score(guess: Tensor, truth: Truth) -> Score:
    found = top1(guess, truth.target_tokens)
    texts = guess[: len(truth.target_tokens)].view(-1, truth.target_shape[1])
    right = (texts == truth.target_tokens.view(truth.target_shape)[: len(texts)]).all(dim=1)
    return Score(found.success, found.chance, right.double().mean().item())


ATTACK = Attack(
    id="A10",
    title="sequential inversion",
    needs="PB",
    source="arXiv 2510.15511",
    metric="share of the target's tokens; value: share of whole texts",
    chance="the most frequent token's share",
    run=_run,
    score=_score,
    fires_on="balanced",
    fires_at=0.9,
)
