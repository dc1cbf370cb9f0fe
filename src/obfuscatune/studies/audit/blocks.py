r"""The blocks and secret orders of a Monarch key, from an estimate of it that is up to 60 % noise.

Between a group of rows that share a block of B1 and a group of columns that share one of B2, ``R = U V^T`` with
orthonormal columns in U and V, one for each feature that the two blocks share, b^2 / d on average. So

- the energy there is the number of shared features, which is not the same everywhere: groups are found in the singular
  vectors of ``R^2``, zeros or none, and sharpened by what the low-rank parts of a group keep of each row;
- singular values there are 0 or 1, which separates the features from the noise;
- with groups and numbers known, ``max tr(R^T G)`` is a Procrustes problem of one block of B1, or of B2, after another.
"""

import torch
from torch import Tensor

from obfuscatune.studies.audit.algebra import polar

_STARTS = 3  # of k-means and sharpening, which ends in what is best nearby; the least energy left over wins
_ROUNDS = 12  # of sharpening, at most
_STEPS = 30  # of k-means
_SHARED = 0.5  # singular value from which a direction is a shared feature, in a good estimate
_LARGEST = 3  # shared features, in units of their mean, that a noisy estimate is believed to have


class Structure:
    """Groups of rows and of columns of a key ``[d, d]``, as labels ``[d]``, and the features that pairs of them share.

    Args:
        estimate: of the key, orthogonal or not. size: of a block; it divides d. generator: of k-means' starts.
    """

    def __init__(self, estimate: Tensor, size: int, generator: torch.Generator) -> None:
        self.size, self.count = size, len(estimate) // size
        self._right: dict[tuple[int, int], Tensor] = {}
        u, s, v = torch.linalg.svd(estimate.square() - 1 / len(estimate))
        top = max(1, self.count - 1)  # the mean is taken away
        best = float("inf")
        for _ in range(_STARTS):
            self.rows, self.columns = (
                _clusters(side[:, :top] * s[:top], self.count, size, generator) for side in (u, v.mT)
            )
            for _ in range(_ROUNDS):
                before = self.rows
                self.sharpen(estimate)
                if torch.equal(before, self.rows):
                    break
            left = self._left_over(estimate)
            if left < best:
                best, kept = left, (self.rows, self.columns)
        self.rows, self.columns = kept

    def sharpen(self, estimate: Tensor) -> None:
        """Give each row, then each column, to the group whose low-rank parts keep most of it."""
        self.rows = _assign(self._kept(estimate, self.rows, self.columns), self.size)
        self.columns = _assign(self._kept(estimate.mT, self.columns, self.rows), self.size)
        self._right = {}

    def project(self, estimate: Tensor) -> Tensor:
        """The orthogonal matrix near the estimate whose parts between groups have their low ranks."""
        found = torch.zeros_like(estimate)
        for rows in self._groups(self.rows):
            for columns in self._groups(self.columns):
                u, s, v = torch.linalg.svd(estimate[rows][:, columns], full_matrices=False)
                rank = self._rank(s)
                found[rows[:, None], columns] = (u[:, :rank] * s[:rank]) @ v[:rank]
        return polar(found)

    def fit(self, target: Tensor) -> Tensor:
        """A Monarch key with these groups that has a large ``tr(R^T target)``; a call goes on where the last ended."""
        rows, columns = self._groups(self.rows), self._groups(self.columns)
        parts = {(i, j): target[r][:, c] for i, r in enumerate(rows) for j, c in enumerate(columns)}
        if not self._right:
            for place, part in parts.items():
                _, s, v = torch.linalg.svd(part, full_matrices=False)
                self._right[place] = v[: int((s > _SHARED).sum())].mT
        left: dict[tuple[int, int], Tensor] = {}
        for i in range(self.count):
            places = [(i, j) for j in range(self.count)]
            left |= _turn(places, [parts[place] @ self._right[place] for place in places])
        for j in range(self.count):
            places = [(i, j) for i in range(self.count)]
            self._right |= _turn(places, [parts[place].mT @ left[place] for place in places])
        key = torch.zeros_like(target)
        for i, j in parts:
            key[rows[i][:, None], columns[j]] = left[i, j] @ self._right[i, j].mT
        return key

    def _kept(self, estimate: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        scores = estimate.new_zeros(len(rows), self.count)
        for c in self._groups(columns):
            part = estimate[:, c]
            for i, r in enumerate(self._groups(rows)):
                _, s, v = torch.linalg.svd(part[r], full_matrices=False)
                scores[:, i] += (part @ v[: self._rank(s)].mT).square().sum(dim=1)
        return scores

    def _rank(self, s: Tensor) -> int:
        mean = self.size / self.count
        return round(min(_LARGEST * max(mean, 1.0), s.square().sum().item()))

    def _left_over(self, estimate: Tensor) -> float:
        """Energy of an estimate that its structure does not explain."""
        left = 0.0
        for rows in self._groups(self.rows):
            for columns in self._groups(self.columns):
                s = torch.linalg.svdvals(estimate[rows][:, columns])
                left += s[self._rank(s) :].square().sum().item()
        return left

    def _groups(self, labels: Tensor) -> list[Tensor]:
        return [(labels == i).nonzero().flatten() for i in range(self.count)]


def _turn(places: list[tuple[int, int]], sides: list[Tensor]) -> dict[tuple[int, int], Tensor]:
    """Orthonormal columns nearest to those of all sides together, one block of the key."""
    u, _, v = torch.linalg.svd(torch.cat(sides, dim=1), full_matrices=False)
    parts = (u @ v).split([side.shape[1] for side in sides], dim=1)
    return dict(zip(places, parts, strict=True))


def _clusters(points: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """K-means in groups of one size: labels ``[n]``."""
    centres = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(_STEPS):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        means = [points[nearest == i].mean(dim=0) for i in range(count)]
        centres = torch.stack([centres[i] if mean.isnan().any() else mean for i, mean in enumerate(means)])
    return _assign(-torch.cdist(points, centres), size)


def _assign(scores: Tensor, size: int) -> Tensor:
    """A group for each row of scores ``[n, groups]``, the clearest first, ``size`` rows a group."""
    labels = torch.full((len(scores),), -1)
    room = [size] * scores.shape[1]
    for place in scores.flatten().argsort(descending=True).tolist():
        row, group = divmod(place, scores.shape[1])
        if labels[row] < 0 and room[group]:
            labels[row], room[group] = group, room[group] - 1
    return labels
