"""Which servers are gone: those that another incarnation has taken the place of.

Nobody can ask a server that is gone about its backends. A server has one or two names: its address,
and, while it is a primary, whose primary it is. If another incarnation has one of them by now, the
server's backends are gone, and their slots are free. Pure.

A name proves nothing once an incarnation that was replaced has answered again: two servers that
live have it (hosts behind a balancer, a tunnel that leads elsewhere now).
"""

from __future__ import annotations

from collections.abc import Iterable

from sharedpool.broker.core.commands import ServerIncarnation


class SeenServers:
    """The servers that control connections were on, and which of them is there now."""

    def __init__(self, seen: Iterable[ServerIncarnation]) -> None:
        """`seen`: by former brokers, the newest last."""
        self._known: dict[str, list[ServerIncarnation]] = {}  # by name, the newest last
        self._ambiguous: set[str] = set()  # names of two servers at a time
        self._present: tuple[ServerIncarnation, ...] = ()
        for server in seen:
            self._add(server)

    def note(self, *present: ServerIncarnation) -> list[ServerIncarnation]:
        """Record the names of the server that answers now; return those that are news."""
        self._present = present
        return [server for server in present if self._add(server)]

    def _add(self, server: ServerIncarnation) -> bool:
        known = self._known.setdefault(server.name, [])
        if known[-1:] == [server]:
            return False
        if any(each.boot_us == server.boot_us for each in known[:-1]):
            self._ambiguous.add(server.name)
        known[:] = [each for each in known if each.boot_us != server.boot_us]
        known.append(server)
        return True

    def was_seen(self, boot_us: int) -> bool:
        """Return True if a control connection was on the server that was started at `boot_us`."""
        return any(each.boot_us == boot_us for known in self._known.values() for each in known)

    def is_gone(self, boot_us: int) -> bool:
        """Return True if the present server is in the place of the one started at `boot_us`."""
        return any(
            _replaces(present, former)
            for present in self._present
            if present.name not in self._ambiguous
            for former in self._known[present.name]
            if former.boot_us == boot_us
        )


def _replaces(present: ServerIncarnation, former: ServerIncarnation) -> bool:
    """Return True if one incarnation has taken the other's place.

    1. At an address there is one server at a time.
    2. Of two primaries the one of the later timeline counts: a former primary that starts again
       knows of no promotion. If a volume was moved from one machine to another, the timeline is the
       same: then the one that was started later.
    """
    if present.boot_us == former.boot_us:
        return False
    if not present.timeline:
        return True
    return (present.timeline, present.boot_us) > (former.timeline, former.boot_us)
