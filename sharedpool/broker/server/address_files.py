"""Keep what lies at a broker's address there, the broker's own, and young: others clean up temporary directories.

A lock file that is gone locks nobody out, and a socket that is gone lets nobody in who is not connected already.
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
        """Make anew what somebody has deleted, if this broker is still `wanted`.

        Return False when the address is another broker's by now, or nobody's any more: this one is to leave.
        """
        try:
            return self._mend(wanted=wanted)
        except (OSError, SharedPoolError) as error:
            if not self._in_trouble:  # once, not at every look
                logger.error("what was deleted at %s cannot be made anew: %s", self._address, error)
                self._in_trouble = True
            return True

    def _mend(self, *, wanted: bool) -> bool:
        if not self._lock.is_ours():
            if not wanted:
                logger.info(
                    "the lock file of %s is gone, and nobody uses it: leaving", self._address
                )
                return False
            os.makedirs(self._lock.path.parent, mode=0o700, exist_ok=True)
            if not self._lock.mend():
                logger.error(
                    "the lock file of %s is another broker's: leaving it to that one", self._address
                )
                return False
            self._say("lock file")
        if self._journal.mend():
            self._say("journal")
        if self._router.mend():
            self._say("socket")
        if self._desk is not None and self._desk.mend():
            self._say("desk")
        self._in_trouble = False
        return True

    def _say(self, what: str) -> None:
        text = "the %s of %s was deleted: made anew (does a cleaner of temporary directories spare it?)"
        logger.warning(text, what, self._address)
