"""The histograms' buckets, the same in every process, so that the broker can add them up."""

from __future__ import annotations

# Upper bounds in seconds, inclusive; one more bucket has what took longer. A hand-over takes 0.3 ms, a connect 5.
BOUNDS_S = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
BUCKETS = len(BOUNDS_S) + 1
