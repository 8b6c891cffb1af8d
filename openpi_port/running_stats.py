"""Streaming, mergeable statistics: moments and extremes exactly, quantiles exactly while the data are few.

Once there are more than `2 * block` rows, quantiles come from a deterministic compactor sketch (Munro and
Paterson 1980; Manku, Rajagopalan and Lindsay 1998), one per dimension: whenever a level holds two blocks,
they are sorted together and every second value goes up one level with twice the weight. One such step at
weight w moves the rank of any value by at most w, down when the odd positions stay and up when the even
ones stay. Both kinds alternate, and the sketch adds up what it did, so `rank_error` is a bound that holds
for this very stream, merges included: about log2(n / block) / (4 * block) of the rows, which is 0.007 %
after 10 million rows.

Axis letters: N rows, J dimensions.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from openpi_port.errors import UserError

BLOCK = 32768  # rows a level keeps: 65,536 rows are exact, and a level of 32 dimensions takes 8 MB


@dataclasses.dataclass(frozen=True, eq=False)
class Stats:
    """Statistics per dimension, float64 [J], in the robot's units.

    Attributes:
      mean, std: std is of the population (divided by N), as openpi's.
      q01, q99: quantiles of 1 % and 99 %; None where a file has none.
      min, max, count: None where they are unknown (openpi's file format does not hold them).
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None
    min: np.ndarray | None = None
    max: np.ndarray | None = None
    count: int | None = None


class RunningStats:
    """Gathers `Stats` over a stream, or over parts of it that are merged afterwards.

    Args:
      dim: J.
      block: rows per level of the quantile sketch; quantiles are exact up to twice as many rows.
    """

    def __init__(self, dim: int, block: int = BLOCK):
        self.dim, self.block, self.count = dim, block, 0
        self._mean, self._m2 = np.zeros(dim), np.zeros(dim)
        self._min, self._max = np.full(dim, np.inf), np.full(dim, -np.inf)
        self._levels: list[list[np.ndarray]] = [[]]  # at h: arrays [n, J] of weight 2**h rows
        self._up, self._down = 0, 0  # how far compaction can have moved a rank, in rows
        self._keep_odd = True

    @property
    def rank_error(self) -> float:
        """Bound on how far a quantile is from the one asked for, as a share of the rows; 0 while exact."""
        return max(self._up, self._down) / max(self.count, 1)

    def update(self, x: np.ndarray) -> None:
        """Adds rows.

        Args:
          x: [..., J], finite.

        Raises:
          UserError: another number of dimensions, or a value that is not finite (named by its dimension).
        """
        x = np.asarray(x, np.float64)
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise UserError(f"statistics of {self.dim} dimensions were given values of shape {list(x.shape)}")
        x = x.reshape(-1, self.dim)
        if not (finite := np.isfinite(x).all(axis=0)).all():
            raise UserError(f"dimension {int(np.argmin(finite))} holds a value that is not a finite number")
        if len(x) == 0:
            return
        self._moments(len(x), x.mean(axis=0), ((x - x.mean(axis=0)) ** 2).sum(axis=0))
        self._min, self._max = np.minimum(self._min, x.min(axis=0)), np.maximum(self._max, x.max(axis=0))
        for start in range(0, len(x), self.block):  # so that no level grows far beyond two blocks
            self._levels[0].append(x[start : start + self.block].copy())
            self._compact()

    def merge(self, other: RunningStats) -> RunningStats:
        """The statistics of both streams together, as a new object; neither is changed.

        Raises:
          ValueError: they have different dimensions or block sizes.
        """
        if (self.dim, self.block) != (other.dim, other.block):
            raise ValueError("cannot merge statistics of different dimensions or block sizes")
        both = RunningStats(self.dim, self.block)
        for part in (self, other):
            both._moments(part.count, part._mean, part._m2)
            both._min, both._max = np.minimum(both._min, part._min), np.maximum(both._max, part._max)
            both._up, both._down = both._up + part._up, both._down + part._down
            for level, arrays in enumerate(part._levels):
                while len(both._levels) <= level:
                    both._levels.append([])
                both._levels[level].extend(arrays)
        both._compact()
        return both

    def finish(self) -> Stats:
        """The statistics so far.

        Raises:
          UserError: nothing was added.
        """
        if self.count == 0:
            raise UserError("no rows to take statistics of: the data set is empty")
        q01, q99 = self.quantiles([0.01, 0.99])
        std = np.sqrt(self._m2 / self.count)
        return Stats(self._mean.copy(), std, q01, q99, self._min.copy(), self._max.copy(), self.count)

    def quantiles(self, q: list[float]) -> np.ndarray:
        """[len(q), J]; linear between neighbours, as numpy's default, where exact."""
        values = np.concatenate([a for level in self._levels for a in level])
        weights = np.concatenate(
            [np.full(sum(map(len, level)), 2.0**h) for h, level in enumerate(self._levels) if level]
        )
        order = np.argsort(values, axis=0, kind="stable")
        out = np.empty((len(q), self.dim))
        for j in range(self.dim):
            w = weights[order[:, j]]
            ranks = np.cumsum(w) - (w + 1) / 2  # the middle of the rows that a value stands for
            out[:, j] = np.interp(np.asarray(q) * (w.sum() - 1), ranks, values[order[:, j], j])
        return np.clip(out, self._min, self._max)

    def _moments(self, count: int, mean: np.ndarray, m2: np.ndarray) -> None:
        """Adds a group's moments (Chan, Golub and LeVeque 1979), which loses no digits to a large mean."""
        if count == 0:
            return
        total = self.count + count
        delta = mean - self._mean
        self._mean = self._mean + delta * (count / total)
        self._m2 = self._m2 + m2 + delta**2 * (self.count * count / total)
        self.count = total

    def _compact(self) -> None:
        """Halves every level above two blocks into the one above it; an odd row out stays where it is."""
        level = 0
        while level < len(self._levels):
            rows = sum(map(len, self._levels[level]))
            if rows > 2 * self.block:
                values = np.concatenate(self._levels[level])
                even = rows - rows % 2
                self._levels[level] = [values[even:]] if rows % 2 else []
                values = np.sort(values[:even], axis=0)
                if level + 1 == len(self._levels):
                    self._levels.append([])
                self._levels[level + 1].append(values[1::2] if self._keep_odd else values[0::2])
                if self._keep_odd:
                    self._down += 2**level
                else:
                    self._up += 2**level
                self._keep_odd = not self._keep_odd
            level += 1
