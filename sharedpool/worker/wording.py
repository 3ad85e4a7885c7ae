"""The texts of errors: which pool, which numbers, what to do next."""

from __future__ import annotations

from sharedpool.errors import (
    BrokerUnavailable,
    PoolError,
    PoolExhausted,
    PoolTimeout,
    ServerUnavailable,
    SessionsNotKept,
    TooManyWaiting,
)
from sharedpool.wire.messages import Deny, DenyReason, Holder


def refused(pool: str, deny: Deny, wait_s: float) -> PoolError:
    """Return the error for a broker's refusal: who holds most, since when, or what the server said."""
    if deny.reason is DenyReason.FAILING:
        return ServerUnavailable(
            f"pool {pool!r}: PostgreSQL accepts no connections (the next try is in {deny.retry_ms / 1000:.1f} s), as"
            f" another caller has found: {deny.error}"
        )
    if deny.reason is DenyReason.UNSUITABLE:
        return SessionsNotKept(f"pool {pool!r}: {deny.error}")
    if deny.reason is DenyReason.DRAINING:
        return BrokerUnavailable(f"pool {pool!r}: the broker is shutting down and lends nothing any more")
    if deny.reason is DenyReason.PAUSED:
        paused = f"pool {pool!r} is paused (`sharedpool pause`) and lends nothing until it is resumed"
        return PoolTimeout(f"{paused}: waited {wait_s:g} s") if wait_s else PoolExhausted(paused)
    held = ", ".join(map(_holding, deny.holders))
    who = f"; held most by {held}" if held else ""
    scope = "all pools of the broker" if deny.capped else "all processes"
    if deny.group:
        scope = f"all processes of group {deny.group!r}"
    elif deny.reserved:
        scope += f", {deny.reserved} of it reserved for other groups,"
    if deny.reason is DenyReason.TIMEOUT:
        return PoolTimeout(
            f"pool {pool!r}: no connection became free within {wait_s:g} s: the limit of {deny.max_conn} over"
            f" {scope} is in use{who}. Return connections sooner, wait longer or raise max_conn"
        )
    if deny.reason is DenyReason.CROWDED:
        return TooManyWaiting(
            f"pool {pool!r}: the limit of {deny.max_conn} connections over {scope} is in use, and as many callers as"
            f" max_waiting allows wait already{who}. Return connections sooner, or raise max_conn or max_waiting"
        )
    server = f" (and PostgreSQL opens no more: {deny.error})" if deny.error else ""
    return PoolExhausted(
        f"pool {pool!r} is exhausted: the limit of {deny.max_conn} connections over {scope} is in use and none is"
        f" idle{server}{who}. Wait with get_conn(timeout=seconds), return connections sooner or raise max_conn"
    )


def _holding(holder: Holder) -> str:
    """Return how much somebody holds, since when, and where that was checked out."""
    longest = f"longest {holder.longest_ms / 1000:.1f} s" if holder.longest_ms else ""
    site = f"checked out at {holder.site}" if holder.site else ""
    details = ", ".join(filter(None, (longest, site)))
    return f"{holder.label} {holder.count}" + (f" ({details})" if details else "")


def timed_out(pool: str, limit: int, wait_s: float) -> PoolTimeout:
    """Return the error for a wait that ended before the broker could say why."""
    return PoolTimeout(
        f"pool {pool!r}: no connection became free within {wait_s:g} s (limit {limit} over all processes)."
        " Return connections sooner, wait longer or raise max_conn"
    )


def unanswered(pool: str, address: str, waited_s: float, trouble: str) -> BrokerUnavailable:
    """Return the error for a broker that does not answer."""
    return BrokerUnavailable(
        f"pool {pool!r}: the broker at {address} did not answer within {waited_s:.1f} s ({trouble})."
        " Is `sharedpool broker` running, and is SHAREDPOOL_BROKER (or broker=) its address?"
    )
