"""How sure a success rate is."""

from __future__ import annotations

import math

Z95 = 1.959964  # of the normal distribution, for 95 %


def interval(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: also sensible for 0 and for all (Wilson 1927).

    Args:
      successes: of
      episodes: tries, at least one.

    Returns:
      Lower and upper end, within [0, 1].
    """
    share, z2 = successes / episodes, Z95**2
    centre = (share + z2 / (2 * episodes)) / (1 + z2 / episodes)
    half = Z95 / (1 + z2 / episodes) * math.sqrt(share * (1 - share) / episodes + z2 / (4 * episodes**2))
    return max(0.0, centre - half), min(1.0, centre + half)
