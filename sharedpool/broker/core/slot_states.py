"""The states of a slot, and which may follow which.

    FREE ──► GRANTED ──► OPEN ──► CLOSING ──► FREE        on a good day
    any occupied state ──► SUSPECT ──► FENCING ──► FREE   its worker is silent, dead or unsure

FREE is not stored: a slot without a lease is free.
"""

from __future__ import annotations

from enum import Enum


class SlotState(Enum):
    """Where a slot is, as far as the broker knows."""

    FREE = "free"
    GRANTED = "granted"
    OPEN = "open"
    CLOSING = "closing"
    SUSPECT = "suspect"
    FENCING = "fencing"

    # Each state is one object. Enum's own hash is a Python function, and slower.
    __hash__ = object.__hash__


# In Python 3.11 an attribute of an Enum class takes as long as five names of a module.
FREE, GRANTED, OPEN, CLOSING, SUSPECT, FENCING = SlotState

TRANSITIONS: dict[SlotState, frozenset[SlotState]] = {
    # OPEN: claimed by HELLO after a broker restart; SUSPECT: known from before it.
    FREE: frozenset({GRANTED, OPEN, SUSPECT}),
    GRANTED: frozenset({OPEN, FREE, SUSPECT}),
    OPEN: frozenset({CLOSING, FREE, SUSPECT}),
    CLOSING: frozenset({OPEN, FREE, SUSPECT}),
    SUSPECT: frozenset({GRANTED, OPEN, CLOSING, FREE, FENCING}),
    FENCING: frozenset({FREE}),
}
