"""The real ledger and the real caches in a world of random events.

Modelled: processes that are killed, frozen, on another host; a broker that dies in the middle of what it was to do, and
its journal; a server (`server.py`); messages by ZeroMQ, on a bad network lost, doubled, late (`network.py`); custody of
sockets; and the hand-over of live connections (`desk.py`): giving step by step, passing, parking, withdrawing, cancels,
sessions with and without it in one pool; and the lane (`lane.py`, `moving.py`): tickets, shelf and wait sockets that go
on without a broker, invitations that come before a WELCOME, threads without a wait socket, interrupts, the short and
the slow path to give and to take, step by step, over the real board. Not modelled: what psycopg2 and libpq do (a reset
succeeds or fails), interrupts of who gives, and sockets that died on one side.

What is promised, and looked at after every step, is in `promises.py`: never more backends than `max_conn`, each counted
by a lease as long as it lives, in at most one worker's hands, passed on by nobody who still has it nor with an open
transaction; the ledger's own invariants. When faults have stopped, everybody is served and every slot can be had.

`SHAREDPOOL_MODEL_SEED=7 pytest tests/model` runs with another seed, `SHAREDPOOL_MODEL_EXAMPLES=2000` for longer.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.machine import BadNetwork, GoodNetwork

SEED = int(os.environ.get("SHAREDPOOL_MODEL_SEED", "1"))
EXAMPLES = int(os.environ.get("SHAREDPOOL_MODEL_EXAMPLES", "56"))
STEPS = 200
PARTS = 8
# In all at least 70,000 steps that did something, of both machines: some 100,000 as a rule.
FEWEST_STEPS = 70_000 / (2 * PARTS)
FEWEST_MOVES, FEWEST_PASSES = (
    5,
    5,
)  # in the lane, and by the broker, in each part: as a rule some hundred
PROFILE = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    print_blob=True,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("machine", [GoodNetwork, BadNetwork])
def test_model(machine: type[GoodNetwork], part: int) -> None:
    machine = type(
        f"{machine.__name__}{part}", (machine,), {"steps": 0, "moved": 0, "passed": 0, "lost": 0}
    )
    number = SEED * 100 + part
    try:
        run_state_machine_as_test(seed(number)(machine), settings=PROFILE)
    except Exception as error:
        error.add_note(f"SHAREDPOOL_MODEL_SEED={SEED} does this again")
        raise
    counts = f"{machine.steps} steps, {machine.moved} moves, {machine.passed} passed, {machine.lost} lost with a broker"
    print(f"{machine.__name__}: {counts}, SHAREDPOOL_MODEL_SEED={SEED}")
    if SEED == 1 and EXAMPLES >= 56:  # other seeds may find fewer
        assert machine.steps >= FEWEST_STEPS
        assert machine.moved >= FEWEST_MOVES
        assert machine.passed >= FEWEST_PASSES
