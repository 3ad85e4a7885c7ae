"""What a process reports to the broker: the leases and requests of one pool. Pure.

The broker compares each RENEW with its ledger. So a RENEW lists everything that the process holds,
even what no thread has taken over yet. It repeats each release until the broker has acknowledged
it.

The caller holds the pool's lock around every method.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from msgspec import structs

from sharedpool.wire.desk import Moved
from sharedpool.wire.messages import Bye, Release, Renew
from sharedpool.wire.values import NO_TOKEN, LeaseReport, Phase, Token
from sharedpool.worker.core.callsite import shown_stack
from sharedpool.worker.core.lease import Lease
from sharedpool.worker.core.timings import Timings
from sharedpool.worker.core.waiters import Waiters

_MAX_UNPROVEN = 100  # releases in one RENEW
_MAX_STACKS = 200  # leases whose whole stack fits into one RENEW


def lease_reports(
    leases: Collection[Lease], now: float, threads: Mapping[int, str]
) -> list[LeaseReport]:
    """Return every lease as the broker should see it; `threads` names threads by identifier."""
    depth = None if len(leases) <= _MAX_STACKS else 1
    return [
        LeaseReport(
            lease.token,
            lease.phase,
            max(0, int((now - lease.since) * 1000)),
            threads.get(lease.thread, "") if lease.phase is Phase.IN_USE else "",
            lease.backend,
            shown_stack(lease.stack[:depth]) if lease.phase is Phase.IN_USE else [],
            lease.moves,
        )
        for lease in leases
    ]


class Reporter:
    """Composes the reports on the leases and waiters of one cache."""

    def __init__(self, leases: dict[Token, Lease], waiters: Waiters, timings: Timings) -> None:
        self._leases = leases
        self._waiters = waiters
        self._timings = timings
        self.newest_grant = NO_TOKEN
        # Leases given back that the broker has not acknowledged: those whose backend was seen to
        # end, and all others with their RELEASE, which is repeated.
        self.given_back: dict[Token, None] = {}
        self._unproven: dict[Token, Release] = {}
        # Connections that a thread has read from the lane and has not taken over yet. The function
        # returns None once the thread has dropped the connection because of an interrupt.
        self.arriving: dict[Token, tuple[Moved, Callable[[], object | None]]] = {}
        # Connections in the lane's sockets that no thread had read when the link last looked.
        self.unread: list[Moved] = []
        # True while a thread may hold a received connection that is in neither of the two above.
        self.unsure = False

    def released(self, release: Release) -> None:
        """Report a lease as given back until the broker acknowledges it."""
        if release.gone:
            self.given_back[release.token] = None
        else:
            self._unproven[release.token] = release

    def acknowledged(self, tokens: Iterable[Token]) -> None:
        """Stop reporting these leases as given back: the broker knows of them."""
        for token in tokens:
            self.given_back.pop(token, None)
            self._unproven.pop(token, None)

    def renewal(self, now: float, threads: Mapping[int, str], *, answers: int = 0) -> Renew:
        """Return a RENEW with all leases and requests; `answers` is the RECALL that it answers."""
        return Renew(
            self.held(now, threads),
            self.newest_grant,
            answers,
            self._waiters.pending(),
            list(self.given_back),
            unproven=list(self._unproven.values())[:_MAX_UNPROVEN],
            unsure=self.unsure,
        )

    def heartbeat(self, now: float, threads: Mapping[int, str], hits: int) -> Renew:
        """Return a RENEW with the timings as well."""
        return structs.replace(self.renewal(now, threads), times=self._timings.news(hits))

    def farewell(self, hits: int) -> Bye:
        """Return the session's last message."""
        return Bye(self.newest_grant, self._timings.news(hits))

    def held(self, now: float, threads: Mapping[int, str]) -> list[LeaseReport]:
        """Return reports on all leases, and on those that are arriving in the lane."""
        return lease_reports(self._leases.values(), now, threads) + self._arriving()

    def _arriving(self) -> list[LeaseReport]:
        """Return reports on connections that have come in the lane and are no leases here yet."""
        # Another thread may change `arriving` at any time: iterate over copies.
        for token, (_, thread_s_copy) in list(self.arriving.items()):
            if thread_s_copy() is None:
                self.arriving.pop(token, None)
        in_hand = [moved for moved, _ in list(self.arriving.values())]
        coming = {moved.token: moved for moved in [*self.unread, *in_hand]}
        return [
            LeaseReport(token, Phase.CONNECTING, 0, "", moved.live.backend, [], moved.moves)
            for token, moved in coming.items()
            if token not in self._leases
        ]
