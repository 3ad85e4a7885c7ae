"""Groups of pools share the limit over all pools.

A group has a reservation that is kept free for it, a limit of its own, and a priority for slots
beyond the reservations. Such a slot goes to the waiter of the highest priority, among equals to the
first.
"""

from __future__ import annotations

from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.core.records import Group, Pool


class Groups:
    """All groups, also those without a pool in use. Without terms there are no groups at all."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}
        self.unknown: list[Pool] = []  # pools known by their backends alone

    def __bool__(self) -> bool:
        return bool(self._groups)

    def configure(self, terms: dict[str, GroupTerms]) -> None:
        """Replace all terms, which `check_terms` has checked; pools keep their groups."""
        if not terms:
            self._groups.clear()
            return
        for name in {*self._groups, *terms, ""}:
            self._groups.setdefault(name, Group(name, self.unknown)).terms = terms.get(
                name, GroupTerms()
            )

    def of(self, name: str) -> Group | None:
        """Return a group, with default terms if not configured; None if there are no groups."""
        if not self._groups:
            return None
        return self._groups.setdefault(name, Group(name, self.unknown))

    @property
    def reserved(self) -> int:
        """Slots reserved for all groups."""
        return sum(group.terms.reserved for group in self._groups.values())

    @property
    def beyond(self) -> int:
        """Slots in use beyond the reservations."""
        return sum(group.beyond for group in self._groups.values())

    def available(self, group: Group, cap: int) -> int:
        """Return how many slots of a limit `cap` over all a group may have, its own limit apart."""
        return cap - self.reserved - self.beyond + group.unused

    def check_invariants(self, room: int) -> None:
        """Raise `AssertionError` if `room` free slots are too few for the reservations."""
        assert sum(group.unused for group in self._groups.values()) <= room, (
            "a reservation is used by others"
        )
