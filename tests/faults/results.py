"""How big a run is, and what it measured: one JSON file a row and variant, for the report."""

import json
import os
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# A connection is a dead one handed out when its backend had been gone for so long before the
# checkout began.
CONFIRMED_S = 0.05
# Read at import: the tests hide these variables from the library.
LONG = os.environ.get("SHAREDPOOL_FAULTS") == "long"
SOAK_S = float(os.environ.get("SHAREDPOOL_FAULTS_SOAK_S") or 1800)
_REPORT = os.environ.get("SHAREDPOOL_FAULTS_REPORT")
# What all rows but the soak take on two cores that have nothing else to do.
LONG_MINUTES = 32
HANDOVER = os.environ.get("SHAREDPOOL_FAULTS_HANDOVER") or "auto"
REPORT = Path(_REPORT).absolute() if _REPORT else None
_SEED = os.environ.get("SHAREDPOOL_FAULTS_SEED")


def new_seed() -> int:
    """Return SHAREDPOOL_FAULTS_SEED, or a fresh seed."""
    return int(_SEED) if _SEED else random.SystemRandom().randrange(1 << 32)


def scale(short: T, long: T) -> T:
    """Choose by SHAREDPOOL_FAULTS."""
    return long if LONG else short


@dataclass(slots=True)
class Row:
    """What one row of the table measured, in one variant."""

    name: str
    fault: str
    goal: str
    variant: str
    seed: int
    long: bool = LONG
    passed: bool = False
    measured: str = ""
    worst: float = (
        0.0  # the figure that the goal is about: of two variants, the greater is reported
    )
    overshoot: int | None = None
    peak_by_log: int | None = None
    peak_by_sampler: int | None = None
    leaked: int | None = None
    double_use: int | None = None
    checkouts: int = 0
    backends: int = 0
    faults: int = 0
    moves: int = 0
    handover: str = HANDOVER
    all_within_s: float | None = None
    errors: dict[str, int] = field(default_factory=dict)
    figures: dict[str, object] = field(default_factory=dict)

    def write(self) -> None:
        """Write the file, when there is a place for it."""
        if REPORT is not None:
            REPORT.mkdir(parents=True, exist_ok=True)
            suffix = f"+{self.variant}" if self.variant else ""
            text = json.dumps(asdict(self), indent=1, default=str)
            (REPORT / f"{self.name}{suffix}.json").write_text(text + "\n")


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the value that `percent` of the values do not exceed; 0 without values."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * percent // 100).__int__() - 1))]


def spread(values: list[float], unit_s: float = 1.0, unit: str = "s") -> str:
    """Tell p50, p99 and the maximum in words."""
    if not values:
        return "none measured"
    p50, p99, most = (percentile(values, p) / unit_s for p in (50, 99, 100))
    return f"p50 {p50:.3g} {unit}, p99 {p99:.3g} {unit}, max {most:.3g} {unit} (n={len(values)})"


def merge_counts(count: Counter[str]) -> dict[str, int]:
    """Order a count for the report: the most frequent first."""
    return dict(count.most_common())
