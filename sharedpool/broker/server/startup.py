"""Claim a broker's address, and build the parts of the broker from what was found there.

The order matters: the lock keeps other brokers out, the journal tells what a former broker has
granted, and the lock's epoch must be newer than every token in that journal.
"""

from __future__ import annotations

import logging
import math
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sharedpool.broker.core.ledger import Ledger, LedgerCall
from sharedpool.broker.postgres.control import Control
from sharedpool.broker.postgres.leadership import Leadership
from sharedpool.broker.postgres.share_sessions import ShareSessions
from sharedpool.broker.server import desk as desks
from sharedpool.broker.server.desk import Desk
from sharedpool.broker.server.journal import Journal
from sharedpool.broker.settings import BrokerSettings
from sharedpool.discovery import address as addresses
from sharedpool.discovery.lock_file import BrokerLock
from sharedpool.discovery.scope import scope_of
from sharedpool.errors import ConfigError, SharedPoolError
from sharedpool.postgres.conninfo import ConnInfo

logger = logging.getLogger("sharedpool.broker")


@dataclass(frozen=True, slots=True)
class Claim:
    """The files of one address, held by this broker."""

    lock: BrokerLock
    journal: Journal
    desk: Desk | None  # None where the platform or the path allows none

    def abandon(self) -> None:
        """Give the address up again: this broker has not started, and has granted nothing."""
        if self.desk is not None:
            self.desk.unlink()
            self.desk.close()
        self.journal.close(for_good=self.lock.first and not self.journal.entries)
        self.lock.release()


def claim_address(address: str) -> Claim:
    """Lock an address and open its files.

    Raise `AlreadyRunning` when another broker has it, `SharedPoolError` when a file cannot be made.
    """
    try:
        lock = BrokerLock(addresses.lock_path(address))
    except OSError as error:
        raise SharedPoolError(f"cannot lock {error.filename}: {error.strerror}") from error
    try:
        journal = Journal(addresses.journal_path(address))
    except OSError as error:
        lock.release()
        raise SharedPoolError(f"cannot write {error.filename}: {error.strerror}") from error
    lock.outgrow(max((entry.token.epoch for entry in journal.entries), default=0))
    return Claim(lock, journal, _open_desk(addresses.desk_path(address)))


def _open_desk(path: Path | None) -> Desk | None:
    """Open the desk where there can be one."""
    if not desks.SUPPORTED or path is None:
        return None
    try:
        return Desk(path)
    except OSError as error:
        text = "no desk at %s (%s): the slots of a killed worker come back later"
        logger.warning(text, path, error)
        return None


def make_ledger(settings: BrokerSettings, claim: Claim) -> Ledger:
    """Return the ledger of a broker that has claimed its address."""
    return Ledger(
        claim.lock.epoch,
        max_conn=settings.max_conn,
        ttl_s=settings.ttl_s,
        max_checkout_s=settings.max_checkout_s,
        has_control_connection=settings.dsn is not None,
        journal_complete=claim.journal.intact,
        random=random.random,
        instance=claim.lock.instance,
        desk="" if claim.desk is None else str(claim.desk.path),
        # Without a control connection no query on a connection that has moved could be cancelled.
        handover=claim.desk is not None and settings.dsn is not None,
        by_database=settings.automatic,
        groups=settings.groups,
        limits=settings.limits,
        server=_server_of(settings.dsn),
        shared=shares_limits(settings),
        scope=settings.address,
        expiration_s=math.inf if settings.expiration_s is None else settings.expiration_s,
    )


def _server_of(dsn: str | None) -> str:
    """Return the part of a server's description (`conninfo.ServerIdentity`) that `dsn` decides."""
    if dsn is None:
        return ""
    try:
        identity = ConnInfo(dsn).identity()
    except ConfigError:
        return "\0"  # matches no server; the control connection reports what is wrong with the DSN
    return f"@{identity.host}:{identity.port}/"


def shares_limits(settings: BrokerSettings) -> bool:
    """Return True if other hosts may count to the same limits: see `broker/core/sharing.py`."""
    return settings.dsn is not None and not settings.one_off


def make_shares(
    settings: BrokerSettings, claim: Claim, call_soon: Callable[[LedgerCall], None]
) -> ShareSessions | None:
    """Return the sessions by which limits are shared with other hosts, if they are."""
    if settings.dsn is None or not shares_limits(settings):
        return None
    return ShareSessions(
        settings.dsn, claim.lock.instance, socket.gethostname(), settings.ttl_s, call_soon
    )


def make_control(
    settings: BrokerSettings, claim: Claim, call_soon: Callable[[LedgerCall], None]
) -> Control:
    """Return the control connection, with the leadership lock if this broker has a scope."""
    scope = settings.scope or ("" if settings.one_off else scope_of(settings.address))
    instance = claim.lock.instance
    leadership = Leadership(scope, instance, call_soon) if scope and settings.dsn else None
    return Control(
        settings.dsn,
        settings.max_conn,
        instance,
        call_soon,
        claim.journal.servers,
        leadership,
        maintenance=settings.automatic,
    )
