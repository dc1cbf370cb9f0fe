r"""A24, linking: independent keys of the streams are one, because the residual sum ties the streams together.

A norm leaves the direction of the residual, so the rows x before and y after a sublayer with output o satisfy

    y_t = a_t x_t P + b_t (o_t Q + c),   P = Ra^-1 Rc,   Q = Rb^-1 Rc

with unknown scalars a_t, b_t of each token and an unknown constant c, of biases. No key, no base and no text is needed:
for given scalars, P, Q and c are a linear regression; what it leaves over tells the scalars. We start with alternating
steps under orthogonality, which give a part of P from few tokens, and go on with Gauss-Newton steps on the scalars
alone (variable projection), which converge where alternating ones creep. From 2 d + 3 tokens on, the regression has
more equations than unknowns. Norms that are not folded have a gain G: P = Ra^-1 G1^-1 G2 Rc then. Its orthogonal
polar factor is Ra^-1 Rc again; that of Q nearly so.

Block after block this gives one unknown rotation of the whole body. Where one key covers all, as in ``stream``, the
relation holds with P = Q = 1, which is tried first.

Source: R6 in docs/security.md. Variable projection: Golub and Pereyra 1973, in the form of Kaufman 1975.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.profiles import Profile
from obfuscatune.studies.audit.algebra import polar
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth
from obfuscatune.studies.audit.text import token_rows
from obfuscatune.studies.audit.view import WorkerView

Place = tuple[int, str]
_ROWS = 4.5  # rows per width that are used: more only average the rounding of what was sent
_FEWEST = 2.2  # rows per width for the regression
_ALTERNATIONS = 20
_STEPS = 40
_CONVERGED = 1e-5  # relative change of the residual


@dataclass(frozen=True, slots=True, repr=False)
class Link:
    """What ties three streams: rows of ``first @ carried`` and of ``added @ joined`` are in ``last``'s key.

    Attributes:
        carried, joined: relative keys ``[d, d]``. constant: ``[d]``, in ``last``'s key, on the scale of ``added``.
        residual: share of the last stream's norm that the relation leaves unexplained.
    """

    first: Place
    added: Place
    last: Place
    carried: Tensor
    joined: Tensor
    constant: Tensor
    residual: float

    def residuals(self, x: Tensor, o: Tensor, y: Tensor) -> Tensor:
        """The residual itself before the sublayer ``[n, d]``, in ``first``'s key and on the scale of ``added``.

        Args: rows of the three streams ``[n, d]``, in their order.
        """
        a, b = _scalars(x @ self.carried, o @ self.joined + self.constant, y)
        return x * (a / b)[:, None]


def junctions(blocks: int) -> list[tuple[Place, Place, Place]]:
    """Where a sublayer's output is added: attention in, its out, mlp in; mlp in, its out, the next attention in."""
    found: list[tuple[Place, Place, Place]] = []
    for block in range(blocks):
        found.append(((block, "attention in"), (block, "attention out"), (block, "mlp in")))
        if block + 1 < blocks:
            found.append(((block, "mlp in"), (block, "mlp out"), (block + 1, "attention in")))
    return found


def link_all(view: WorkerView, *, orthogonal: bool) -> list[Link]:
    """Link all streams of a session, junction after junction."""
    links = []
    for places in junctions(view.blocks):
        rows = [token_rows(view, *place) for place in places]
        if any(not len(part) for part in rows):
            raise NotApplicableError("a stream of the residual does not cross")
        links.append(link(places, *rows, orthogonal=orthogonal))
    return links


def link(places: tuple[Place, Place, Place], x: Tensor, o: Tensor, y: Tensor, *, orthogonal: bool = True) -> Link:
    """Find the relative keys of three streams ``[n, d]`` of the same tokens. orthogonal: whether keys are."""
    count, width = min(len(x), len(o), len(y)), y.shape[1]
    keep = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: int(_ROWS * width)]
    x, o, y = x[keep], o[keep], y[keep]
    same = _Fit.of(x, o, y)
    if same.residual(y) < 1e-3:
        eye = torch.eye(width, dtype=y.dtype)
        return Link(*places, eye, eye, torch.zeros(width, dtype=y.dtype), same.residual(y))
    # Centred, for constants to have columns of their own; of one size, for the scalars to be near one.
    centre, spread = (o.mean(dim=0), x.std() / o.std().clamp_min(1e-30))
    x0, o0 = x - x.mean(dim=0), (o - centre) * spread
    fit = _alternate(x0, o0, y - y.mean(dim=0))
    if len(keep) > _FEWEST * width:
        fit = _project(x0, o0, y, fit.a, fit.b)
    p = polar(fit.p) if orthogonal else fit.p
    q, size_q = _keyed(fit.q) if orthogonal else (fit.q, 1.0)
    constant = fit.shift / size_q / spread - centre @ q
    return Link(*places, p, q, constant, fit.residual(y))


def _keyed(fitted: Tensor) -> tuple[Tensor, float]:
    """Polar factor and size of a fitted map, without what it maps to nothing: a norm takes the mean from its rows."""
    u, sizes, v = torch.linalg.svd(fitted)
    size = sizes.median().clamp_min(1e-30).item()
    return u * (sizes > 0.1 * size).to(fitted.dtype) @ v, size


@dataclass(slots=True, repr=False)
class _Fit:
    """Scalars a, b ``[n]``, maps p, q ``[d, d]``, b's constant ``[d]``, and what they make of x and o ``[n, d]``."""

    a: Tensor
    b: Tensor
    p: Tensor
    q: Tensor
    shift: Tensor
    fitted: Tensor

    @classmethod
    def of(cls, x: Tensor, o: Tensor, y: Tensor) -> "_Fit":
        """The fit of the scalars alone, maps being one."""
        a, b = _scalars(x, o, y)
        eye = torch.eye(y.shape[1], dtype=y.dtype)
        return cls(a, b, eye, eye, y.new_zeros(y.shape[1]), a[:, None] * x + b[:, None] * o)

    def residual(self, y: Tensor) -> float:
        return ((y - self.fitted).norm() / y.norm().clamp_min(1e-300)).item()  # type: ignore[no-any-return]


def _scalars(u: Tensor, v: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares ``y_t = a_t u_t + b_t v_t``, token by token."""
    uu, uv, vv = (u * u).sum(1), (u * v).sum(1), (v * v).sum(1)
    uy, vy = (u * y).sum(1), (v * y).sum(1)
    det = (uu * vv - uv * uv).clamp_min(1e-9 * (uu * vv).mean().clamp_min(1e-300))
    return (vv * uy - uv * vy) / det, (uu * vy - uv * uy) / det


def _alternate(x: Tensor, o: Tensor, y: Tensor) -> _Fit:
    """Orthogonal Procrustes for the one map, for the other, then the scalars; on centred rows."""
    one = y.new_ones(len(y))
    zero = torch.zeros_like(x.mT @ o)
    fit = _Fit(one, one.clone(), zero, zero, y.new_zeros(y.shape[1]), torch.zeros_like(y))
    for step in range(_ALTERNATIONS):
        left = fit.a[:, None] * x
        p = _scaled(left, y - fit.b[:, None] * (o @ fit.q))
        right = fit.b[:, None] * o
        q = _scaled(right, y - left @ p)
        u, v = x @ p, o @ q
        # Scalars only once the maps are more than noise; kept near one, so that none takes a row for itself.
        a, b = _scalars(u, v, y) if step >= _ALTERNATIONS // 2 else (fit.a, fit.b)
        a, b = (part.clamp(0.2, 5.0) / part.clamp(0.2, 5.0).mean() for part in (a, b))
        fit = _Fit(a, b, p, q, fit.shift, a[:, None] * u + b[:, None] * v)
    return fit


def _scaled(x: Tensor, y: Tensor) -> Tensor:
    """The multiple of an orthogonal map that brings x nearest to y."""
    cross = x.mT @ y
    q = polar(cross)
    return q * ((q * cross).sum() / x.square().sum().clamp_min(1e-300))


def _project(x: Tensor, o: Tensor, y: Tensor, a: Tensor, b: Tensor) -> _Fit:
    """Gauss-Newton (Levenberg-Marquardt) on the scalars; maps and constants are always the regression on them."""
    damping = 1e-2
    fit, outside = _regress(x, o, y, a, b)
    loss = fit.residual(y)
    for _ in range(_STEPS):
        u, v, rest = x @ fit.p, o @ fit.q + fit.shift, y - fit.fitted
        both = torch.cat([u, v])
        hessian = (both @ both.mT).view(2, len(y), 2, len(y)) * outside[None, :, None, :]
        hessian = hessian.reshape(2 * len(y), 2 * len(y))
        gradient = torch.cat([(u * rest).sum(1), (v * rest).sum(1)])
        ridge = hessian.diagonal() + 1e-9 * hessian.diagonal().mean()
        while True:
            step = torch.linalg.solve(hessian + damping * ridge.diag(), gradient)
            a, b = fit.a + step[: len(y)], fit.b + step[len(y) :]
            tried, off = _regress(x, o, y, a / a.mean(), b / b.mean())
            if tried.residual(y) < loss or damping > 1e4:
                break
            damping *= 10
        before, loss = loss, tried.residual(y)
        if loss > before:
            return fit
        fit, outside, damping = tried, off, damping / 10
        if before - loss < _CONVERGED * before or loss < 1e-6:
            break
    return fit


def _regress(x: Tensor, o: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[_Fit, Tensor]:
    """The regression of y on ``[a x, b o, a, b, 1]``, and the projector on what it cannot reach ``[n, n]``."""
    ones, d = y.new_ones(len(y), 1), y.shape[1]
    design = torch.cat([a[:, None] * x, b[:, None] * o, a[:, None], b[:, None], ones], dim=1)
    gram = design.mT @ design
    gram.diagonal().add_(1e-10 * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram)
    maps = torch.cholesky_solve(design.mT @ y, factor)
    outside = torch.eye(len(y), dtype=y.dtype) - design @ torch.cholesky_solve(design.mT, factor)
    return _Fit(a, b, maps[:d], maps[d : 2 * d], maps[2 * d + 1], design @ maps), outside


def is_orthogonal(profile: Profile) -> bool:
    """Whether its keys on the residual's streams are."""
    return profile.keys in ("identity", "haar", "monarch")


def _run(sample: Sample, knowledge: Knowledge) -> list[Link]:
    return link_all(sample.view, orthogonal=is_orthogonal(knowledge.profile))


def relative_key_cosine(guess: Tensor, into: Tensor, out: Tensor) -> float:
    """Cosine of a guess with ``into^-1 out``, in plain coordinates, where norms have no mean."""
    width = len(guess)
    centring = torch.eye(width, dtype=guess.dtype) - 1.0 / width
    plain = centring @ into @ torch.linalg.solve(out, guess, left=False) @ centring
    return ((plain * centring).sum() / (plain.norm() * centring.norm()).clamp_min(1e-300)).item()  # type: ignore[no-any-return]


def relative_error_of(cosine: float) -> float:
    """Relative error, up to scale, of a guess of that cosine: 1 where it has nothing of the truth."""
    return math.sqrt(max(0.0, 1.0 - max(0.0, cosine) ** 2))


def _score(guess: list[Link], truth: Truth) -> Score:
    """The cosine, and not one minus the error, of which a sixth of a map found is one part in seventy."""
    cosines = []
    for found in guess:
        first, added, last = (truth.keys[place] for place in (found.first, found.added, found.last))
        cosines += [relative_key_cosine(found.carried, first, last), relative_key_cosine(found.joined, added, last)]
    errors = [relative_error_of(cosine) for cosine in cosines]
    return Score(sum(cosines) / len(cosines), 0.0, sum(errors) / len(errors))


ATTACK = Attack(
    id="A24",
    title="linking of streams",
    needs="N",
    source="R6 in docs/security.md",
    metric="mean cosine of the relative keys with the true ones, over all junctions; value: their mean relative error",
    chance="0: a random rotation",
    run=_run,
    score=_score,
    fires_on="balanced",
    fires_at=0.9,
)
