"""What an operator orders a broker to do (`sharedpool pause`, `set`, ...), and its answer; needs no session.

Taken only of who is on the broker's host.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from sharedpool.wire.messages import NO_TOKEN, Struct, Token


class OrderKind(StrEnum):
    """What is to be done; `Order` names what else it needs."""

    PAUSE = "pause"
    RESUME = "resume"
    LIMIT = "limit"  # number: the new max_conn
    DRAIN = "drain"  # number: a process
    KILL = "kill"  # token: a lease
    RECONNECT = "reconnect"


class Order(Struct, frozen=True, tag="order"):
    """Do this to a pool, "" being all of them."""

    version: int
    kind: OrderKind
    pool: str = ""
    number: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0
    token: Token = NO_TOKEN


class Done(Struct, frozen=True, tag="done"):
    """What was done, line by line; or why it cannot be (`error`)."""

    said: list[str]
    error: str = ""
