"""What the figures are made of. Pure."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """A median, and the least and the greatest of the values it is of."""

    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Summarise one value for each round. Raises ValueError for none."""
    if not values:
        raise ValueError("no values")
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Divide round by round: the two of a round were measured next to each other, so what disturbed
    both cancels out.

    A round in which the peer's figure is zero gives no ratio.
    """
    return [one / other for one, other in zip(ours, theirs, strict=False) if other]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of a hundred values do not exceed (nearest
    rank).

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[min(len(ordered), max(1, int(rank))) - 1]


def fairness(counts: Sequence[int]) -> float:
    """Return the least by the greatest: 1 is fair, 0 means that somebody got nothing.

    Raises ValueError for none.
    """
    if not counts:
        raise ValueError("no counts")
    return min(counts) / max(counts) if max(counts) else 0.0


def curve(values: Sequence[float], points: int = 400) -> list[tuple[float, float]]:
    """Return the distribution as (value, share of values at or below it), by at most about `points`
    steps.

    The last percent gets as many of them as the rest: it is what one looks for.
    """
    ordered = sorted(values)
    if not ordered:
        return []
    half = max(1, points // 2)
    shares = [n / half * 0.99 for n in range(1, half)] + [
        0.99 + n / half * 0.01 for n in range(half + 1)
    ]
    last = len(ordered) - 1
    return [(ordered[min(last, int(share * len(ordered)))], share) for share in shares]
