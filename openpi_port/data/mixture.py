"""Which sample of a run comes from which data set, where several are mixed: a pure function of the sample's number.

Shares are exact at any moment: of the first n samples of a run, a data set with half of the weight has n / 2, up to
rounding. So every batch is as mixed as its size allows, and each data set goes through its own epochs, every row once
in each, as it would alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


class Shares:
    """A deterministic interleaving.

    Args:
      weights: one for each data set, above 0, in any unit.
    """

    def __init__(self, weights: Sequence[float]):
        # A weight is the decimal number that was written, so that 0.1 is a tenth; integers never round.
        exact = [Fraction(str(weight)) for weight in weights]
        self._first_of_rest = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]

    def place(self, index: int) -> tuple[int, int]:
        """Where a sample comes from.

        Args:
          index: of the sample in the run, from 0.

        Returns:
          (number of the data set, how many samples it gave before).
        """
        # The first data set gets floor(n * share) of n samples; what is left is divided among the others alike.
        for number, share in enumerate(self._first_of_rest):
            before = _floor(index, share)
            if _floor(index + 1, share) > before:
                return number, before
            index -= before
        raise AssertionError("the last data set takes all that is left")


def _floor(count: int, share: Fraction) -> int:
    return count * share.numerator // share.denominator
