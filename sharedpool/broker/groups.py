"""Groups: who may have how much of the limit over all pools.

A group has a reservation that is kept free for it, a limit of its own, and a priority for all beyond the reservations.
What is not reserved is shared: a slot of it goes to the waiter of the highest priority, among equals to the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sharedpool.errors import ConfigError

if TYPE_CHECKING:
    from sharedpool.broker.records import Pool


@dataclass(frozen=True, slots=True)
class GroupTerms:
    """What one group is promised: `reserved` slots, at most `max_conn` (None: no limit of its own), by `priority`."""

    reserved: int = 0
    max_conn: int | None = None
    priority: int = 0


@dataclass(slots=True, eq=False)
class Group:
    """One group and its pools. `unknown` are pools of which nobody knows the group: they may be this one's."""

    name: str
    unknown: list[Pool]
    terms: GroupTerms = GroupTerms()
    pools: list[Pool] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Slots in use."""
        return sum(len(pool.leases) for pool in self.pools)

    @property
    def room(self) -> int:
        """Slots that it may have yet under its own limit."""
        if self.terms.max_conn is None:
            return 1 << 30
        return self.terms.max_conn - self.count - sum(len(pool.leases) for pool in self.unknown)

    @property
    def unused(self) -> int:
        """Slots reserved for it and not in use."""
        return max(0, self.terms.reserved - self.count)

    @property
    def beyond(self) -> int:
        """Slots in use beyond the reservation: those that others may want back."""
        return max(0, self.count - self.terms.reserved)

    @property
    def spare(self) -> int:
        """Slots of those that are not on their way back yet."""
        return max(0, self.beyond - sum(pool.coming for pool in self.pools))


class Groups:
    """All groups, also of pools that nobody uses at the moment. Without terms there is no group: first come only."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}
        self.unknown: list[Pool] = []  # known by their backends alone

    def __bool__(self) -> bool:
        return bool(self._groups)

    def configure(self, terms: dict[str, GroupTerms]) -> None:
        """Replace all terms; `pools` keep their groups. Nothing is checked: see `check_terms`."""
        if not terms:
            self._groups.clear()
            return
        for name in {*self._groups, *terms, ""}:
            self._groups.setdefault(name, Group(name, self.unknown)).terms = terms.get(name, GroupTerms())

    def of(self, name: str) -> Group | None:
        """Return a group; one that was not configured has the terms of the rest. None while there are no groups."""
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
        """Return how many slots a group may be granted of a limit `cap` over all, its own limit apart."""
        return cap - self.reserved - self.beyond + group.unused

    def check_invariants(self, room: int) -> None:
        """Raise `AssertionError` when of so many free slots not all can be had that are reserved."""
        assert sum(group.unused for group in self._groups.values()) <= room, "a reservation is used by others"


def check_terms(terms: dict[str, GroupTerms], cap: int | None, where: str = "groups") -> None:
    """Raise `ConfigError` for terms that cannot be kept together."""
    if terms and cap is None:
        raise ConfigError(f"{where}: groups share a limit over all pools, and there is none (max-conn)")
    for name, group in terms.items():
        if group.max_conn is not None and group.max_conn < group.reserved:
            raise ConfigError(f"{where}.{name}: min {group.reserved} is more than max {group.max_conn}")
    reserved = sum(group.reserved for group in terms.values())
    if cap is not None and reserved > cap:
        raise ConfigError(f"{where}: {reserved} connections are reserved (min), of {cap} in all (max-conn)")
