"""The states of a slot."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.backoff import Backoff
from sharedpool.broker.core.records import Lease as Slot
from sharedpool.broker.core.records import Pool, Session
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.broker.core.slots import Slots
from sharedpool.wire.values import PoolSpec, Token


def test_an_unknown_transition_is_a_bug() -> None:
    slots = Slots(None, lambda command: None)
    pool = Pool(PoolSpec("p", 1, 1000), 1, Backoff(lambda: 0.5))
    session = Session(b"s", 1, "", "s", pool, 60.0, 0.0)
    lease = Slot(Token(1, 1), session, pool)
    with pytest.raises(AssertionError, match="bug: lease 1-1: free -> closing"):
        slots.move(lease, SlotState.CLOSING, "test")
