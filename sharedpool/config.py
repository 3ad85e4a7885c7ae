"""`config_pool` and `get_pool`: check the settings, find the broker, keep the current pools."""

from __future__ import annotations

import math
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
_current: dict[str, Pool] = {}


def config_pool(
    max_conn: int = 5,
    expiration: float = 60,
    disable_pooling: bool = False,
    pool_manager: type[Pool] = SimpleConnectionPool,
    *,
    name: str = "default",
    group: str | None = None,
    broker: str | None = None,
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
    """Make a pool, and make it the one that `get_pool(name)` returns. Connects to nothing yet.

    `max_conn`: the limit over all processes that share the pool. `expiration`: seconds after which an idle connection
    is closed. `disable_pooling`: every get connects and every put closes, still under the limit. `pool_manager`:
    `SimpleConnectionPool` (one thread) or `ThreadedConnectionPool`. `name`: pools of one broker by name. `group`:
    whose share of the broker's limit it uses, where its configuration has groups; else SHAREDPOOL_GROUP. `broker`: its
    address; else SHAREDPOOL_BROKER; else one is found or started for this user, server and name. `timeout`: seconds
    `get_conn` waits when it is not told. `max_lifetime`: seconds after which a connection is replaced (±10 %).
    `max_checkout`: seconds after which the broker reports a connection that is still out; with `max_checkout_action`
    "end" it ends it too, and its user gets an `OperationalError`. `max_waiting`: how many
    callers of all processes may wait at a time; further ones get `TooManyWaiting`. `configure(conn)` runs
    after connecting, and again when a connection came from another process; `check(conn)` at every checkout.

    `handover`: "auto" passes a live connection on to a process that waits, where that can be (same host, no TLS);
    "off" always closes it here and opens one there. `reset`: what is done before it moves: "discard" (DISCARD ALL) or
    "rollback" (no more than at every checkin), or a function that is called at every checkin. `time_slice`: seconds for
    which a process that uses a connection all the time may keep it while others wait; ten times as long where it would
    have to be closed. `debug_checkouts`: note where each connection is checked out, for `sharedpool who`, for
    `max_checkout`'s report and for the texts of `PoolExhausted` and `PoolTimeout`; costs some microseconds a checkout.

    Where to connect: `dsn`, `db_url` or psycopg2's keywords; else DATABASE_DSN, DATABASE_URL, libpq's environment.
    `dsn`, `password` and other keywords that do not name the server may be functions without arguments, asked at every
    connect, in the thread of `get_conn`'s caller (`dsn` here, too, for the server's name); what they raise is raised.
    Raise `ConfigError`, a `ValueError`, that names the argument.
    """
    check_number("max_conn", max_conn, least=1, whole=True)
    check_number("expiration", expiration)
    if timeout != math.inf:
        check_number("timeout", timeout)
    for argument, value in (("max_lifetime", max_lifetime), ("max_checkout", max_checkout)):
        if value is not None:
            check_number(argument, value, above=True)
    if max_waiting is not None:
        check_number("max_waiting", max_waiting, least=1, whole=True)
    for argument, callback in (("configure", configure), ("check", check)):
        if callback is not None and not callable(callback):
            raise ConfigError(f"{argument}: must be a function of one connection, not {callback!r}")
    if reset not in ("discard", "rollback") and not callable(reset):
        raise ConfigError(
            f'reset: must be "discard", "rollback" or a function of one connection, not {reset!r}'
        )
    if max_checkout_action not in ("report", "end"):
        raise ConfigError(
            f'max_checkout_action: must be "report" or "end", not {max_checkout_action!r}'
        )
    if handover not in ("auto", "off"):
        raise ConfigError(f'handover: must be "auto" or "off", not {handover!r}')
    check_number("slice", time_slice)
    if not (isinstance(pool_manager, type) and issubclass(pool_manager, Pool)):
        raise ConfigError(
            f"pool_manager: must be SimpleConnectionPool or ThreadedConnectionPool, not {pool_manager!r}"
        )
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ConfigError(f"name: must be a printable text that is not empty, not {name!r}")
    if group is None:
        group = os.environ.get(_GROUP_VARIABLE, "")
    if not isinstance(group, str) or not group.isprintable() or "@" in group:
        raise ConfigError(f"group: must be a printable text without an @, not {group!r}")
    conninfo = resolve(dsn=dsn, db_url=db_url, **connect_kwargs)
    conninfo.identity()  # a service that libpq cannot find is an error here, not at the first checkout
    address, source = broker, "broker"
    if address is None:
        address, source = (
            os.environ.get(addresses.BROKER_VARIABLE) or None,
            addresses.BROKER_VARIABLE,
        )
    config = PoolConfig(
        conninfo=conninfo,
        name=name,
        group=group,
        max_conn=int(max_conn),
        expiration=float(expiration),
        disable_pooling=bool(disable_pooling),
        broker=None if address is None else addresses.check_address(address, source),
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
    )
    pool = pool_manager(
        config, AutomaticBroker(conninfo) if config.broker is None else GivenBroker(config.broker)
    )
    previous = _current.get(name)
    _current[name] = pool
    if previous is not None and not previous.disposed:
        previous.retire()
    return pool


def get_pool(name: str = "default") -> Pool:
    """Return the pool that `config_pool` last made under `name`; raise `PoolError` when there is none."""
    try:
        return _current[name]
    except KeyError:
        others = ", ".join(f"get_pool({other!r})" for other in sorted(_current))
        text = f"no pool {name!r} is configured: call sharedpool.config_pool() first"
        raise SharedPoolError(
            f"{text}, or take one that is: {others}" if others else text
        ) from None
