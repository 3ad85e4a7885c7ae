"""Keep the files of a broker's address in place: cleaners of temporary directories may delete them.

Without its lock file a broker keeps no other broker out. Without its socket no new worker can
connect. Time stamps are refreshed, as cleaners look for old files.
"""

from __future__ import annotations

import logging
import os

from sharedpool.broker.server.desk import Desk
from sharedpool.broker.server.journal import Journal
from sharedpool.broker.server.router_socket import RouterSocket
from sharedpool.discovery.lock_file import BrokerLock
from sharedpool.errors import SharedPoolError

logger = logging.getLogger("sharedpool.broker")


class AddressFiles:
    """The files of one address: lock, journal, socket and desk."""

    def __init__(
        self,
        address: str,
        lock: BrokerLock,
        journal: Journal,
        router: RouterSocket,
        desk: Desk | None,
    ) -> None:
        self._address = address
        self._lock = lock
        self._journal = journal
        self._router = router
        self._desk = desk
        self._in_trouble = False

    def check(self, *, wanted: bool) -> bool:
        """Make the files again that were deleted, if this broker is still `wanted`.

        Return False if this broker has to stop: the address is another broker's by now, or the
        files are gone and nobody needs them.
        """
        try:
            return self._recreate_deleted(wanted=wanted)
        except (OSError, SharedPoolError) as error:
            if not self._in_trouble:  # logged once, not with every check
                text = "the deleted files of %s cannot be made again: %s"
                logger.error(text, self._address, error)
                self._in_trouble = True
            return True

    def _recreate_deleted(self, *, wanted: bool) -> bool:
        if not self._lock.is_ours():
            if not wanted:
                logger.info(
                    "the lock file of %s was deleted, and nobody uses the broker: stopping",
                    self._address,
                )
                return False
            os.makedirs(self._lock.path.parent, mode=0o700, exist_ok=True)
            if not self._lock.recreate():
                logger.error(
                    "the lock file of %s is another broker's by now: stopping", self._address
                )
                return False
            self._warn("lock file")
        if self._journal.recreate_if_deleted():
            self._warn("journal")
        if self._router.recreate_if_deleted():
            self._warn("socket")
        if self._desk is not None and self._desk.recreate_if_deleted():
            self._warn("desk")
        self._in_trouble = False
        return True

    def _warn(self, what: str) -> None:
        text = (
            "the %s of %s was deleted, and is made again: a cleaner of temporary directories should"
            " spare it"
        )
        logger.warning(text, what, self._address)
