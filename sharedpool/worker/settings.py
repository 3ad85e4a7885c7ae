"""What a pool was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from psycopg2.extensions import connection

from sharedpool.conninfo import ConnInfo

Callback = Callable[[connection], object]


@dataclass(frozen=True, slots=True)
class PoolConfig:
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
    configure: Callback | None = None
    reset: Callback | None = None
    check: Callback | None = None
    max_waiting: int | None = None
