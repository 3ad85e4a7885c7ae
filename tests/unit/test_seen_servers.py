"""Which servers are gone, by what the control connection has seen."""

import pytest

from sharedpool.broker.core.commands import ServerIncarnation
from sharedpool.broker.core.seen_servers import SeenServers

ONE, OTHER = "db1:5432 10.0.0.1:5432", "db2:5432 10.0.0.2:5432"
PRIMARY = "primary of 7 at db1,db2::5432"


def at(address: str, boot_us: int, timeline: int = 0) -> tuple[ServerIncarnation, ...]:
    """Return the names of a server; with a `timeline` it is a primary."""
    names = ServerIncarnation(address, boot_us), ServerIncarnation(PRIMARY, boot_us, timeline)
    return names[: 1 + (timeline > 0)]


@pytest.mark.parametrize(
    ("former", "present", "gone"),
    [
        (at(ONE, 100), at(ONE, 200), True),  # restarted
        (at(ONE, 200), at(ONE, 100), True),  # and its clock was set back
        (at(ONE, 100), at(ONE, 100), False),  # it is there
        (at(ONE, 100), at(OTHER, 200), False),  # another server; both may be there
        (at(ONE, 100, 1), at(OTHER, 50, 2), True),  # a replica that ran before was promoted
        (at(ONE, 100, 1), at(OTHER, 50), False),  # not yet
        (at(ONE, 100, 2), at(OTHER, 200, 1), False),  # a former primary was started again
        (at(ONE, 100, 1), at(OTHER, 200, 1), True),  # its volume was moved to another machine
        (at(ONE, 200, 1), at(OTHER, 100, 1), False),  # a copy that ran before
    ],
)
def test_a_server_is_gone_when_another_one_is_in_its_place(
    former: tuple[ServerIncarnation, ...], present: tuple[ServerIncarnation, ...], gone: bool
) -> None:
    servers = SeenServers(former)  # by a former broker
    assert servers.note(*present) == [name for name in present if name not in former]
    assert servers.is_gone(former[0].boot_us) is gone
    assert servers.was_seen(former[0].boot_us)
    assert not servers.is_gone(999)
    assert not servers.was_seen(999)


def test_a_name_of_two_servers_at_a_time_proves_nothing_any_more() -> None:
    """A balancer, or a tunnel, leads now to the one and now to the other."""
    servers = SeenServers([])
    servers.note(*at(ONE, 100, 1))
    servers.note(*at(OTHER, 200, 1))
    assert servers.is_gone(100)  # as far as anybody knows
    servers.note(*at(ONE, 100, 1))
    servers.note(*at(OTHER, 200, 1))
    assert not servers.is_gone(100)
    servers.note(*at(ONE, 300, 1))
    assert servers.is_gone(100)  # by its address


def test_a_replica_that_is_promoted_gets_its_second_name_then() -> None:
    servers = SeenServers(at(ONE, 100, 1))
    servers.note(*at(OTHER, 50))
    assert not servers.is_gone(100)
    assert servers.note(*at(OTHER, 50, 2)) == [ServerIncarnation(PRIMARY, 50, 2)]
    assert servers.is_gone(100)
