"""The texts of a checkout's errors: which pool, which numbers, what to do next."""

from __future__ import annotations

from sharedpool.discovery.address import obstacle
from sharedpool.errors import (
    BrokerUnavailable,
    ConnectRefused,
    PoolError,
    PoolExhausted,
    PoolTimeout,
    ServerUnavailable,
    SessionsNotKept,
    SharedPoolError,
    TooManyWaiting,
)
from sharedpool.wire.messages import Deny, DenyReason
from sharedpool.wire.values import Holder


def refused(pool: str, deny: Deny, wait_s: float) -> PoolError:
    """Return the error for a refusal, with the largest holders or the server's error."""
    if deny.reason is DenyReason.FAILING:
        return ServerUnavailable(
            f"pool {pool!r}: PostgreSQL accepts no connections"
            f" (the next try is in {deny.retry_ms / 1000:.1f} s): {deny.error}"
        )
    if deny.reason is DenyReason.REFUSED:
        return ConnectRefused(
            f"pool {pool!r}: PostgreSQL has refused this process"
            f" (the next try is in {deny.retry_ms / 1000:.1f} s): {deny.error}"
        )
    if deny.reason is DenyReason.UNSUITABLE:
        return SessionsNotKept(f"pool {pool!r}: {deny.error}")
    if deny.reason is DenyReason.DRAINING:
        ending = f"pool {pool!r}: the broker is shutting down and grants no connections"
        return BrokerUnavailable(
            f"{ending}; no other broker came within {wait_s:g} s" if wait_s else ending
        )
    if deny.reason is DenyReason.PAUSED:
        paused = f"pool {pool!r} is paused (`sharedpool pause`): no connections until it is resumed"
        return PoolTimeout(f"{paused}: waited {wait_s:g} s") if wait_s else PoolExhausted(paused)
    if deny.reason is DenyReason.WAITING:
        return PoolTimeout(
            f"pool {pool!r}: waited {wait_s:g} s;"
            f" the broker grants no connections yet: {deny.error}"
        )
    held = ", ".join(map(_holder_text, deny.holders))
    who = f"; held most by {held}" if held else ""
    scope = "all pools of the broker" if deny.capped else "all processes"
    if deny.group:
        scope = f"all processes of group {deny.group!r}"
    elif deny.reserved:
        scope += f", {deny.reserved} of it reserved for other groups,"
    if deny.reason is DenyReason.TIMEOUT:
        return PoolTimeout(
            f"pool {pool!r}: no connection became free within {wait_s:g} s:"
            f" the limit of {deny.max_conn} over {scope} is in use{who}."
            " Return connections sooner, wait longer or raise max_conn"
        )
    if deny.reason is DenyReason.CROWDED:
        return TooManyWaiting(
            f"pool {pool!r}: the limit of {deny.max_conn} connections over {scope} is in use,"
            f" and as many callers as max_waiting allows wait already{who}."
            " Return connections sooner, or raise max_conn or max_waiting"
        )
    server = f" (and PostgreSQL opens no more: {deny.error})" if deny.error else ""
    return PoolExhausted(
        f"pool {pool!r} is exhausted: the limit of {deny.max_conn} connections over {scope}"
        f" is in use and none is idle{server}{who}."
        " Wait with get_conn(timeout=seconds), return connections sooner or raise max_conn"
    )


def _holder_text(holder: Holder) -> str:
    """Return how many connections a process holds, for how long, and where it checked them out."""
    longest = f"longest {holder.longest_ms / 1000:.1f} s" if holder.longest_ms else ""
    site = f"checked out at {holder.site}" if holder.site else ""
    details = ", ".join(filter(None, (longest, site)))
    return f"{holder.label} {holder.count}" + (f" ({details})" if details else "")


def timed_out(pool: str, limit: int, wait_s: float) -> PoolTimeout:
    """Return the error for a wait that ended before the broker's refusal came."""
    return PoolTimeout(
        f"pool {pool!r}: no connection became free within {wait_s:g} s"
        f" (limit {limit} over all processes)."
        " Return connections sooner, wait longer or raise max_conn"
    )


def unanswered(
    pool: str, address: str, asked_s: float, waited_s: float, trouble: str
) -> BrokerUnavailable:
    """Return the error for a broker that does not answer.

    The broker was asked `asked_s` seconds ago, the pool `waited_s` seconds ago.
    """
    since = (
        ""
        if waited_s - asked_s < 0.1
        else f", asked after a wait of {waited_s - asked_s:.1f} s for a connection"
    )
    return BrokerUnavailable(
        f"pool {pool!r}: the broker at {address} did not answer within {asked_s:.1f} s{since}"
        f" ({obstacle(address) or trouble})."
        " Is `sharedpool broker` running, and is SHAREDPOOL_BROKER (or broker=) its address?"
    )


def in_the_link(pool: str) -> PoolError:
    """Return the error for a checkout in the link's thread, which would wait for itself."""
    return SharedPoolError(
        f"pool {pool!r}: get_conn() was called in sharedpool's own thread, which would wait for"
        " itself. Was it a __del__ method or a weakref callback? They run in any thread:"
        " hand that work to a thread of your own"
    )


def unsupported(pool: str) -> PoolError:
    """Return the error for a process that eventlet has patched."""
    return SharedPoolError(
        f"pool {pool!r}: sharedpool does not work in a process that eventlet has monkey-patched."
        " Use threads (gunicorn -k gthread, celery -P threads), processes (celery -P prefork) or"
        " gevent"
    )
