"""The division of one limit among hosts: exact, fair, at rest under steady demand."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharedpool.broker.core.shares import Claim, Division, HostShare, decide, fair_shares, spread

FEW = settings(max_examples=30, deadline=None, database=None, derandomize=True)
wants = st.lists(st.integers(0, 30), min_size=1, max_size=8)
limits = st.integers(1, 40)


@dataclass
class Host:
    """A host that uses what it is allowed, and gives back what is not in use."""

    wanted: int = 0
    used: int = 0
    has_idle: bool = False
    division: Division = field(default_factory=lambda: Division(0))

    @property
    def allowed(self) -> int:
        return max(0, self.division.held - self.division.owed)

    def claim(self, asked: int, *, asks: bool = False) -> Claim:
        least = max(self.allowed, self.used)
        return Claim(self.wanted, least, asks, checked=asked, has_idle=self.has_idle)


class Table:
    """The rows, and hosts that sync one after the other."""

    def __init__(self, limit: int, hosts: int) -> None:
        self.limit = limit
        self.asked = 0
        self.hosts = {f"h{number}": Host() for number in range(hosts)}
        self.rows: dict[str, HostShare] = {}

    def sync(self, name: str, *, asks: bool = False) -> Division:
        host, row = self.hosts[name], self.rows.get(name)
        division = host.division = decide(
            self.limit,
            name,
            row.held if row else 0,
            host.claim(self.asked, asks=asks),
            {other: row for other, row in self.rows.items() if other != name},
            told=row.wanted if row else 0,
            asked=self.asked,
            answered=row.answered if row else 0,
            question=host.division.question,
        )
        self.rows[name] = HostShare(name, division.held, host.wanted, division.answered)
        self.asked = division.asked
        return division

    @property
    def held(self) -> dict[str, int]:
        return {name: row.held for name, row in self.rows.items()}

    def settle(self, rounds: int = 3, *, checkins: bool = True) -> None:
        """Let all hosts sync in turn; each uses what it is allowed and wants."""
        for _ in range(rounds):
            for name, host in self.hosts.items():
                if checkins:
                    host.used = min(host.used, host.wanted, host.allowed)
                self.sync(name)
                host.used = max(host.used, min(host.wanted, host.allowed))


# --- fair shares


@given(limits, wants)
@FEW
def test_nobody_gets_more_than_it_wants_while_another_lacks(limit: int, wanted: list[int]) -> None:
    fair = fair_shares(limit, wanted)
    assert all(0 <= share <= want for share, want in zip(fair, wanted, strict=True))
    assert sum(fair) == min(limit, sum(wanted))
    for share, want in zip(fair, wanted, strict=True):
        if share < want:
            assert share >= max(fair) - 1


@pytest.mark.parametrize(
    ("limit", "wanted", "fair"),
    [
        (12, [4, 4, 4], [4, 4, 4]),
        (12, [2, 20, 20], [2, 5, 5]),
        (10, [20, 20, 20], [3, 3, 4]),
        (10, [1, 2, 3], [1, 2, 3]),
        (2, [5, 5, 5], [0, 1, 1]),
        (0, [5, 5], [0, 0]),
        (-3, [5], [0]),
        (5, [], []),
    ],
)
def test_fair_shares_of_examples(limit: int, wanted: list[int], fair: list[int]) -> None:
    assert fair_shares(limit, wanted) == fair


@given(limits, wants)
@FEW
def test_what_nobody_wants_is_spread_in_proportion(limit: int, wanted: list[int]) -> None:
    fair = fair_shares(limit, wanted)
    target = spread(limit, fair)
    assert sum(target) == limit
    extra = [more - share for more, share in zip(target, fair, strict=True)]
    rest, total = sum(extra), sum(fair) + len(fair)
    for more, share in zip(extra, fair, strict=True):
        assert abs(more - rest * (share + 1) / total) < 1


def test_a_host_that_grows_slot_by_slot_asks_seldom() -> None:
    held, asked = 0, 0
    for wanted in range(1, 13):
        if wanted > held:
            asked += 1
            (held, _) = spread(12, fair_shares(12, [wanted, 0]))
    assert asked <= 3


# --- any sequence of syncs

steps = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=80
)


@given(limits, steps)
@FEW
def test_the_sum_never_exceeds_the_limit_and_no_host_holds_less_than_it_uses(
    limit: int, history: list[tuple[int, int, int]]
) -> None:
    """Hosts want, use, give back, leave and come again in any order."""
    table = Table(limit, 5)
    for number, want, what in history:
        name = f"h{number}"
        host = table.hosts[name]
        if what == 0:  # checkins
            host.used = min(host.used, want)
        elif what == 1 and host.used == 0:
            table.rows.pop(name, None)
            table.hosts[name] = Host()
        else:
            host.wanted = max(want, host.used)
            host.has_idle = what == 2
            table.sync(name, asks=want > 8)
        host = table.hosts[name]
        host.used = max(host.used, min(host.wanted, host.allowed))
        assert sum(table.held.values()) <= limit
        for other, row in table.rows.items():
            assert row.held >= table.hosts[other].used, other
            assert table.hosts[other].division.owed <= row.held


@given(limits, st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(0, 3))
@FEW
def test_steady_demand_gets_what_is_fair_and_then_moves_nothing(
    limit: int, wanted: list[int], before: int
) -> None:
    table = Table(limit, len(wanted))
    for host in table.hosts.values():
        host.wanted = before * 3
    table.settle()
    for host, want in zip(table.hosts.values(), wanted, strict=True):
        host.wanted = want
    table.settle(4)
    held = table.held
    assert sum(held.values()) == limit, "capacity is lost"
    fair = fair_shares(limit, wanted)
    for host, share in zip(table.hosts.values(), fair, strict=True):
        assert host.division.lacking == 0
        assert host.used == min(host.wanted, host.division.held)
        assert host.used >= share
    for _ in range(2):
        for name in table.hosts:
            division = table.sync(name)
            assert division.owed == 0
            assert division.to_wake == ()
            assert table.held == held, "the shares move although nothing has changed"


def test_connections_in_use_are_owed_until_they_are_checked_in() -> None:
    table = Table(10, 2)
    table.hosts["h0"].wanted = 10
    table.settle(1)
    table.hosts["h1"].wanted = 5
    table.settle(3, checkins=False)
    assert table.held == {"h0": 10, "h1": 0}
    assert (table.hosts["h0"].division.owed, table.hosts["h1"].division.lacking) == (5, 5)
    table.hosts["h0"].used = 7
    table.settle(1, checkins=False)
    assert table.held == {"h0": 7, "h1": 3}
    table.settle(2)
    assert table.held == {"h0": 5, "h1": 5}


def test_a_host_that_comes_wakes_those_who_have_what_it_lacks() -> None:
    table = Table(10, 3)
    for name in ("h0", "h1"):
        table.hosts[name].wanted = 5
        table.sync(name)
    table.settle(2)
    table.hosts["h2"].wanted = 4
    assert table.sync("h2").to_wake == ("h0", "h1")


def test_who_gives_wakes_those_who_lack() -> None:
    table = Table(4, 2)
    table.hosts["h0"].wanted = table.hosts["h0"].used = 4
    table.sync("h0")
    table.hosts["h1"].wanted = 4
    table.sync("h1")
    table.sync("h0")
    table.hosts["h0"].used = 2
    assert table.sync("h0").to_wake == ("h1",)


def test_idle_capacity_goes_to_who_asks() -> None:
    table = Table(9, 3)
    for host in table.hosts.values():
        host.wanted = 3
    table.settle()
    assert table.held == {"h0": 3, "h1": 3, "h2": 3}
    for host in table.hosts.values():
        host.wanted = 0
    table.hosts["h1"].wanted = 9
    table.settle()
    assert table.held == {"h0": 0, "h1": 9, "h2": 0}


def test_a_lowered_limit_comes_back_from_who_has_too_much() -> None:
    table = Table(10, 2)
    for host in table.hosts.values():
        host.wanted = 5
    table.settle()
    table.limit = 6
    table.settle()
    assert table.held == {"h0": 3, "h1": 3}


def test_nonsense_in_other_rows_takes_nothing_from_the_limit() -> None:
    """Another program of the same role has written them."""
    division = decide(10, "a", 4, Claim(9, 2), {"b": HostShare("b", 10**9, 10**9)})
    assert 0 <= division.held <= 4
    assert division.owed <= division.held


# --- requests that do not wait


def test_nobody_is_exhausted_before_those_with_idle_connections_have_answered() -> None:
    table = Table(4, 2)
    giver = table.hosts["h0"]
    giver.wanted = giver.used = 4
    table.sync("h0")
    table.hosts["h1"].wanted = 2
    assert not table.sync("h1", asks=True).exhausted
    giver.wanted, giver.has_idle = 2, True  # in its workers' caches
    table.sync("h0")
    assert not table.sync("h1").exhausted
    giver.has_idle, giver.wanted = False, 4  # they are all in use again
    assert table.sync("h0").to_wake == ("h1",)
    assert table.sync("h1").exhausted


def test_who_has_only_its_fair_share_is_not_asked() -> None:
    table = Table(4, 2)
    for host in table.hosts.values():
        host.wanted = 4
    table.settle()
    assert table.sync("h1", asks=True).lacking == 0


@given(limits, steps)
@FEW
def test_exhausted_only_when_all_hosts_that_hold_anything_have_answered(
    limit: int, history: list[tuple[int, int, int]]
) -> None:
    table = Table(limit, 5)
    for number, want, what in history:
        name = f"h{number}"
        host = table.hosts[name]
        if what == 0:
            host.used = min(host.used, want)
        host.wanted = max(want, host.used) if what != 3 else want
        host.has_idle = what == 3
        division = table.sync(name, asks=what == 1)
        if 0 < division.asked == division.answered:
            assert not (division.owed and host.has_idle), "it answers, and has something idle"
        host.used = max(host.used, min(host.wanted, host.allowed))
        if not division.exhausted:
            continue
        for other, row in table.rows.items():
            if other != name and row.held:
                assert row.answered >= division.question, "it has not looked since the question"
