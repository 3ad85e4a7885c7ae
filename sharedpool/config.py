"""`config_pool` and `get_pool`, the entry points of the package.

`config_pool` checks its arguments, decides where the broker is, and makes the pool. The newest pool
of each name is the current one, which `get_pool` returns.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

from sharedpool.broker_location import AutomaticBroker, GivenBroker
from sharedpool.discovery import address as addresses
from sharedpool.errors import ConfigError, SharedPoolError
from sharedpool.postgres.conninfo import resolve
from sharedpool.validate import check_number
from sharedpool.worker.pool import Pool, SimpleConnectionPool
from sharedpool.worker.settings import Callback, PoolConfig

_GROUP_VARIABLE = "SHAREDPOOL_GROUP"
_SHARES_VARIABLE = "SHAREDPOOL_SHARES_DATABASE"
_LONGEST_NAME = 63  # bytes, of a database
_current: dict[str, Pool] = {}  # by name


def config_pool(
    max_conn: int = 5,
    expiration: float = 60,
    disable_pooling: bool = False,
    pool_manager: type[Pool] = SimpleConnectionPool,
    *,
    name: str = "default",
    group: str | None = None,
    broker: str | None = None,
    shares_database: str | None = None,
    timeout: float = 0.0,
    dsn: str | Callable[[], str] | None = None,
    db_url: str | None = None,
    max_lifetime: float | None = None,
    max_checkout: float | None = None,
    max_checkout_action: Literal["report", "end"] = "report",
    max_waiting: int | None = None,
    configure: Callback | None = None,
    reset: Callback | Literal["discard", "rollback"] = "discard",
    handover: Literal["auto", "off"] = "auto",
    time_slice: float = 0.002,
    check: Callback | None = None,
    debug_checkouts: bool = False,
    **connect_kwargs: Any,
) -> Pool:
    """Make a pool, and have `get_pool(name)` return it. Connects to nothing yet.

    Times are in seconds. Raise `ConfigError`, which is a `ValueError`, for a wrong argument.

    The limit:

    - `max_conn`: connections over all processes that share the pool.
    - `max_waiting`: callers over all processes that may wait at a time. Further ones get
      `TooManyWaiting`.
    - `group`: whose share of the broker's limit the pool uses, where the broker has groups. By
      default the group that SHAREDPOOL_GROUP names.
    - `disable_pooling`: every get connects and every put closes, still under the limit.

    Which pool, and which broker:

    - `name`: pools of one broker are told apart by their names.
    - `pool_manager`: `SimpleConnectionPool` for one thread, `ThreadedConnectionPool` for many.
    - `broker`: the broker's address. By default SHAREDPOOL_BROKER, or else a broker that is found
      or started for this user, server and role.
    - `shares_database`: where many hosts share the limit: the name of a database on the same
      server, for a broker that was found or started. By default SHAREDPOOL_SHARES_DATABASE, or else
      the pool's own database. The first host decides, for good.

    Where to connect:

    - `dsn`, `db_url` or psycopg2's keywords. By default DATABASE_DSN, DATABASE_URL, or libpq's
      environment. `dsn`, `password` and other keywords that do not name the server may be functions
      without arguments. Every connect calls them in the thread of `get_conn`'s caller, who gets
      their exceptions. A `dsn` function is called here, too, for the server's name.

    How long:

    - `timeout`: how long `get_conn` waits by default. 0: it raises at once.
    - `expiration`: idle time after which a connection is closed.
    - `max_lifetime`: age at which a connection is replaced (±10 %).
    - `max_checkout`: duration after which the broker reports a checkout. With
      `max_checkout_action="end"` the broker also ends the connection, and its user gets an
      `OperationalError`.
    - `time_slice`: how long a process that uses a connection without a pause may keep it while
      others wait; for three uses, if that is no more than five times as long. Ten times as long
      where the connection would have to be closed.

    What happens to a connection:

    - `configure(conn)` runs after connecting, and again when the connection has come from another
      process.
    - `check(conn)` runs at every checkout.
    - `handover`: "auto" passes a live connection on to a process that waits, where that is possible
      (same host, no TLS). "off" closes it here and opens one there.
    - `reset`: what is done before a connection moves: "discard" (DISCARD ALL) or "rollback" (no
      more than at every checkin). A function runs at every checkin instead.
    - `debug_checkouts`: record where each connection is checked out, for `sharedpool who`, for the
      report of `max_checkout` and for the texts of `PoolExhausted` and `PoolTimeout`. Costs some
      microseconds per checkout.
    """
    check_number("max_conn", max_conn, least=1, whole=True)
    check_number("max_waiting", max_waiting, least=1, whole=True, optional=True)
    check_number("expiration", expiration)
    check_number("timeout", timeout, infinite=True)
    check_number("max_lifetime", max_lifetime, above=True, optional=True)
    check_number("max_checkout", max_checkout, above=True, optional=True)
    check_number("time_slice", time_slice)
    _check_choice("max_checkout_action", max_checkout_action, "report", "end")
    _check_choice("handover", handover, "auto", "off")
    _check_callbacks(configure, reset, check)
    if not (isinstance(pool_manager, type) and issubclass(pool_manager, Pool)):
        raise ConfigError(
            "pool_manager: must be SimpleConnectionPool or ThreadedConnectionPool,"
            f" not {pool_manager!r}"
        )
    _check_name(name)
    group = _group(group)
    conninfo = resolve(dsn=dsn, db_url=db_url, **connect_kwargs)
    conninfo.identity()  # raises here, not at the first checkout, for a service unknown to libpq
    address = _broker_address(broker)
    config = PoolConfig(
        conninfo=conninfo,
        name=name,
        group=group,
        max_conn=int(max_conn),
        expiration=float(expiration),
        disable_pooling=bool(disable_pooling),
        broker=address,
        timeout=float(timeout),
        max_lifetime=max_lifetime,
        max_checkout=max_checkout,
        end_overdue=max_checkout_action == "end",
        max_waiting=max_waiting,
        configure=configure,
        reset=reset,
        check=check,
        handover=handover != "off",
        time_slice=float(time_slice),
        debug_checkouts=bool(debug_checkouts),
        shares_database=_shares_database(shares_database),
    )
    location = AutomaticBroker(conninfo) if address is None else GivenBroker(address)
    pool = pool_manager(config, location)
    previous = _current.get(name)
    _current[name] = pool
    if previous is not None and not previous.disposed:
        previous.retire()
    return pool


def _check_choice(argument: str, value: object, *choices: str) -> None:
    if value not in choices:
        named = " or ".join(f'"{choice}"' for choice in choices)
        raise ConfigError(f"{argument}: must be {named}, not {value!r}")


def _check_callbacks(configure: object, reset: object, check: object) -> None:
    for argument, value in (("configure", configure), ("check", check)):
        if value is not None and not callable(value):
            raise ConfigError(f"{argument}: must be a function of one connection, not {value!r}")
    if reset not in ("discard", "rollback") and not callable(reset):
        raise ConfigError(
            f'reset: must be "discard", "rollback" or a function of one connection, not {reset!r}'
        )


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ConfigError(f"name: must be a printable text that is not empty, not {name!r}")


def _group(group: str | None) -> str:
    """Return the group of a pool; empty: none."""
    if group is None:
        group = os.environ.get(_GROUP_VARIABLE, "")
    if not isinstance(group, str) or not group.isprintable() or "@" in group:
        raise ConfigError(f"group: must be a printable text without an @, not {group!r}")
    return group


def _shares_database(name: str | None) -> str:
    """Return the database in which hosts share the limit; empty: the pool's own."""
    if name is None:
        name = os.environ.get(_SHARES_VARIABLE, "")
        if not name:
            return ""
    fits = isinstance(name, str) and name and name.isprintable()
    if not fits or len(name.encode()) > _LONGEST_NAME:
        raise ConfigError(f"shares_database: must be the name of a database, not {name!r}")
    return name


def _broker_address(broker: str | None) -> str | None:
    """Return the address of a pool's broker, or None for the automatic broker."""
    if broker is not None:
        return addresses.check_address(broker, "broker")
    if address := os.environ.get(addresses.BROKER_VARIABLE):
        return addresses.check_address(address, addresses.BROKER_VARIABLE)
    return None


def get_pool(name: str = "default") -> Pool:
    """Return the pool that `config_pool` last made under `name`; raise `PoolError` if none."""
    try:
        return _current[name]
    except KeyError:
        others = ", ".join(f"get_pool({other!r})" for other in sorted(_current))
        text = f"no pool {name!r} is configured: call sharedpool.config_pool() first"
        raise SharedPoolError(
            f"{text}, or take one that is: {others}" if others else text
        ) from None
