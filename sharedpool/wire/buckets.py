"""The histograms' buckets. Every process has the same, so that the broker can add them up."""

from __future__ import annotations

# Inclusive upper bounds in seconds; one more bucket is for longer times. A hand-over takes about
# 0.3 ms, a connect 5 ms.
BOUNDS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
    0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
BUCKETS = len(BOUNDS_S) + 1
