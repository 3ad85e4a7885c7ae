"""The states of a session, and which may follow which.

    LIVE ◄──► UNRESPONSIVE ──► SUSPECT ──► LIVE    it is silent, and speaks again
    any state ──► ENDED                            its worker has left or died

Only what a LIVE session holds is counted on.
"""

from __future__ import annotations

from enum import Enum


class SessionState(Enum):
    """How far a session can be counted on."""

    LIVE = "live"
    UNRESPONSIVE = "unresponsive"  # it has not answered a recall in time
    SUSPECT = "suspect"  # it has been silent for the TTL
    ENDED = "ended"


# In Python 3.11 an attribute of an Enum class takes as long as five names of a module.
LIVE, UNRESPONSIVE, SUSPECT, ENDED = SessionState

SESSION_TRANSITIONS: dict[SessionState, frozenset[SessionState]] = {
    LIVE: frozenset({UNRESPONSIVE, SUSPECT, ENDED}),
    UNRESPONSIVE: frozenset({LIVE, SUSPECT, ENDED}),
    SUSPECT: frozenset({LIVE, ENDED}),
    ENDED: frozenset(),
}
