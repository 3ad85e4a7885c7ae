"""An operator's orders to a broker (`sharedpool pause`, `set`, ...), and its answers.

They need no session. The broker accepts them only from its own host.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from sharedpool.wire.values import NO_TOKEN, Struct, Token


class OrderKind(StrEnum):
    """The kinds of orders."""

    PAUSE = "pause"
    RESUME = "resume"
    LIMIT = "limit"  # number: the new max_conn
    DRAIN = "drain"  # number: a process
    KILL = "kill"  # token: a lease
    RECONNECT = "reconnect"


class Order(Struct, frozen=True, tag="order"):
    """Do something to a pool, or to all pools."""

    version: int
    kind: OrderKind
    pool: str = ""  # "" for all pools
    number: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0
    token: Token = NO_TOKEN
    # PAUSE, RESUME and LIMIT: for all hosts that share the limit.
    all_hosts: bool = False


class Done(Struct, frozen=True, tag="done"):
    """Report what was done, line by line, or why it cannot be done (`error`)."""

    said: list[str]
    error: str = ""
