"""The model itself: its seeds repeat, and its threads do no more than real ones."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, given, seed, settings

from sharedpool.wire.admin import Order, OrderKind
from tests.model.rules import picks
from tests.model.world import World


def test_what_else_is_imported_changes_no_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _draw()
    path = tmp_path / "constants.py"
    path.write_text(f"NUMBERS = {[*range(512, 1024)]}\n")
    spec = importlib.util.spec_from_file_location("constants_of_others", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "constants_of_others", module)
    spec.loader.exec_module(module)

    assert _draw() == before


def _draw() -> list[int]:
    drawn: list[int] = []

    @seed(1)
    @settings(max_examples=300, database=None, phases=[Phase.generate])
    @given(picks)
    def draw(pick: int) -> None:
        drawn.append(pick)

    draw()
    return drawn


def test_nobody_connects_for_an_abandoned_checkout() -> None:
    world = World(None, has_desk=False, handover=False, in_order=True)
    worker = world.start("a")
    world.deliver_all()
    assert world.broker is not None
    world.broker.order(Order(0, OrderKind.LIMIT, "a", 1))
    for _ in range(2):
        worker.checkout(60.0)
    worker.abandoned += worker.waiters
    world.deliver_all()
    assert len(worker.cache.leases) == len(worker.cache.waiting) == 1

    worker.beat()

    assert not worker.connecting
    world.deliver_all()
    assert not world.broker.slots.leases
