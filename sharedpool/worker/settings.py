"""A pool's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from msgspec import Struct
from psycopg2.extensions import connection

from sharedpool.postgres.conninfo import ConnInfo

Callback = Callable[[connection], object]


class PoolConfig(Struct, frozen=True):
    """One pool's settings, checked by `config_pool`; times in seconds.

    `broker` is an address, or None for the automatic broker.
    """

    conninfo: ConnInfo
    name: str = "default"
    max_conn: int = 5
    expiration: float = 60.0
    disable_pooling: bool = False
    broker: str | None = None
    timeout: float = 0.0
    max_lifetime: float | None = None
    max_checkout: float | None = None
    end_overdue: bool = False
    configure: Callback | None = None
    reset: Callback | Literal["discard", "rollback"] = "discard"
    check: Callback | None = None
    max_waiting: int | None = None
    group: str = ""
    handover: bool = True
    time_slice: float = 0.002
    debug_checkouts: bool = False
    shares_database: str = ""  # where hosts share the limit; empty: in the pool's own

    @property
    def user_reset(self) -> Callback | None:
        """The user's own reset, or None."""
        return None if isinstance(self.reset, str) else self.reset

    @property
    def reset_command(self) -> bytes:
        """The command that resets a session before it moves to another process."""
        return b"DISCARD ALL" if self.reset == "discard" else b"UNLISTEN *"
