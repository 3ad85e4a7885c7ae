"""The cache of a worker that takes part in the hand-over."""

from __future__ import annotations

import pytest

from tests.unit.cache_driver import Rig

SLICE_S = 0.002


@pytest.fixture
def rig() -> Rig:
    rig = Rig(slice_s=SLICE_S)
    rig.cache.time_slice.hands_over = True
    return rig
