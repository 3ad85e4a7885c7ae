"""What operators are told of the shares: in the status, in the log and in errors."""

from __future__ import annotations

import logging

from sharedpool.broker.core.context import Context
from sharedpool.broker.core.records import Pool
from sharedpool.broker.core.share_records import Share, ShareRecords
from sharedpool.broker.core.share_terms import SyncResult
from sharedpool.wire.reports import HostReport
from sharedpool.wire.values import Holder


class ShareReports:
    """Tells of the shares of one broker."""

    def __init__(self, context: Context, records: ShareRecords) -> None:
        self._log = context.log
        self._records = records

    def report(self, now: float) -> list[HostReport]:
        """Return the shares of all limits that are not this host's alone, its own first."""
        found: list[HostReport] = []
        for share in self._records.shares.values():
            trouble = share.unshared and f"not shared with other hosts: {share.unshared}"
            if share.frozen:
                trouble = f"opening nothing until other hosts' shares are known: {share.trouble}"
            if not (share.others or trouble):
                continue
            pool = "" if share.pool is None else share.pool.name
            age_s = max(0.0, now - share.synced_at)
            held, wanted = share.division.held, self._records.wanted(share, now)
            age_ms = int(age_s * 1000) if share.registered else 0
            found.append(HostReport(pool, "", "", held, wanted, age_ms, True, trouble))
            found += [
                HostReport(
                    pool,
                    other.host,
                    other.instance,
                    other.held,
                    other.wanted,
                    int((other.silent_s + age_s) * 1000),
                    other.connected,
                )
                for other in share.others
            ]
        return found

    def other_holders(self, pool: Pool) -> list[Holder]:
        """Return what other hosts hold of a pool's limit, for the text of an error."""
        share = self._records.of(pool)
        others = () if share is None else share.others
        return [Holder(f"host {other.host}", other.held, 0) for other in others if other.held]

    def why_unknown(self, pool: Pool) -> str:
        """Return why nothing may be opened before the next sync; empty if that is not so."""
        share = self._records.of(pool)
        if share is None or share.unshared:
            return ""
        if share.frozen and share.trouble:
            return f"this host opens nothing until it knows other hosts' shares: {share.trouble}"
        if share.registered and share.missing and share.division.lacking:
            names = ", ".join(share.missing)
            return f"shares were lost with the server, and their hosts are waited for: {names}"
        if share.registered:
            return ""
        server = pool.spec.server or "the server"
        return f"PostgreSQL has not answered its first connect to {server}"

    def log_moves(self, share: Share, result: SyncResult) -> None:
        """Log what the outcome of a sync changes, before it is recorded."""
        before, now = share.division, result.division
        for line in result.events:
            self._log(logging.WARNING, "%s: %s", share.title, line)
        if share.registered and before.held != now.held and not (before.alone and now.alone):
            why = "others lack slots" if now.held < before.held else "wanted here"
            text = "%s: this host's share is %d of %d now, before %d (%s)"
            self._log(logging.INFO, text, share.title, now.held, result.max_conn, before.held, why)
