"""For how long this host may rely on its shares without a look at those of the others.

After `TRUST_S` without a sync, or when this process did not run, the others may take this host for
gone. Then a share is *frozen*: nothing is opened before the next sync. What is open is used on.
"""

from __future__ import annotations

import logging
import math

from sharedpool.broker.core.context import Context
from sharedpool.broker.core.share_records import Share, ShareRecords
from sharedpool.broker.core.shares import TRUST_S


class ShareTrust:
    """Freezes the shares of one broker when they are not to be relied on."""

    def __init__(self, context: Context, records: ShareRecords) -> None:
        self._log = context.log
        self._records = records
        self.ends = math.inf  # of the share that is trusted for the shortest time

    def renew(self, share: Share, began: float) -> None:
        """Trust a share again, from the beginning of its last sync."""
        share.trusted_until = began + TRUST_S
        self.ends = min(self.ends, share.trusted_until)

    def expire(self, now: float) -> None:
        """Freeze the shares that are not trusted any more; to be called before any grant.

        A slot of a frozen share that has become free is not granted again: its connection may have
        been ended by another host, which has taken the slot.
        """
        for share in self._records.active.values():
            if share.frozen:
                self._records.allow_no_more(share)
        if now < self.ends:
            return
        self.ends = math.inf
        for share in self._records.shares.values():
            if not share.registered or share.unshared or share.frozen:
                continue
            if share.trusted_until <= now:
                self.freeze(share, now, f"no look at the other hosts' shares for {TRUST_S:.0f} s")
            else:
                self.ends = min(self.ends, share.trusted_until)

    def suspended(self, now: float) -> None:
        """Freeze all shares: this process did not run, and others may have taken it for gone."""
        for share in self._records.shares.values():
            if share.registered and not share.unshared:
                self.freeze(share, now, "")
                share.due, share.pending = True, 0  # the outcome of a sync before that is too old
                self._records.let_refuse(share, 0)  # it will come in a moment

    def freeze(self, share: Share, now: float, why: str) -> None:
        """Open nothing more until the next sync."""
        if now >= share.trusted_until and not share.frozen:
            share.memory.silent()
        if why and not share.trouble:
            self._log(logging.WARNING, "%s: opening nothing: %s", share.title, why)
        share.frozen, share.trouble = True, why or share.trouble
        self._records.active[share.key] = share
        self._records.allow_no_more(share)
