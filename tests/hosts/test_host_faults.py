"""Faults of hosts: killed, without power, frozen, cut off, without broker, joining, leaving."""

import random
import signal
from collections.abc import Callable

import pytest

from tests.faults.results import Row, percentile, scale, spread
from tests.faults.schedule import let_pass
from tests.hosts.host import Host
from tests.hosts.world import HOSTS, TRUST_S, WORKERS, World
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.fault, pytest.mark.hosts, pytest.mark.timeout(scale(240, 1800))]

# How long a host is silent, and by when the others have what it had.
SILENT_S = TRUST_S + 5
TAKEN_OVER_S = TRUST_S + scale(10.0, 5.0)
# A reply that a cut cable has swallowed is sent again at growing intervals: the next one may be as
# far as the cut was long.
RECOVERED_S = 3 * SILENT_S


def others(field: World, host: Host) -> list[Host]:
    return [other for other in field.living() if other is not host and other.name in field.working]


@pytest.mark.row(
    "host-killed",
    "a host killed, all its processes at once, 10 times",
    "the others have its capacity ≤ 2 s after its backends are gone",
)
def test_a_killed_host_leaves_its_capacity_to_the_others(field: World, row: Row) -> None:
    """From the moment at which the server shows none of its backends, until the others have all of
    the capacity that their workers can use. Then it joins again, under its name."""
    hosts = field.open()
    took = []
    for turn in range(scale(1, 10)):
        host = hosts[turn % len(hosts)]
        let_pass(1.0)
        at = host.kill()
        field.mourn(host, at)
        row.faults += 1
        gone = field.wait_until_gone(host, at, 10)
        took.append(field.wait_until_full(others(field, host), gone, 30) - gone)
        hosts[turn % len(hosts)] = again = field.lab.add_host(host.name)
        field.join(again).wait_for("out", timeout_s=60)
    field.judge()
    row.figures |= {"took": spread(took)}
    row.worst = max(took)
    row.measured = f"{spread(took)}"
    assert max(took) <= scale(4.0, 2.0)


def silence(
    field: World,
    row: Row,
    begin: Callable[[Host], float],
    end: Callable[[Host], object] | None,
    times: int,
) -> None:
    """Let a host be silent for longer than the trust window, `times` times.

    After each it goes on where it was.
    """
    hosts = field.open()
    took, back = [], []
    for turn in range(times):
        host = hosts[turn % len(hosts)]
        let_pass(1.0)
        at = begin(host)
        row.faults += 1
        if end is None:
            field.mourn(host, at)
        took.append(field.wait_until_full(others(field, host), at, TAKEN_OVER_S + 20) - at)
        let_pass(at + SILENT_S - field.clock())
        if end is None:
            host = hosts[turn % len(hosts)] = field.lab.add_host(host.name)
            since = field.clock()
            crew = field.join(host)
        else:
            since = field.clock()
            end(host)
            crew = field.working[host.name]
        # Each of its workers is served again, and the hosts share as before.
        served = crew.wait_for("out", since, RECOVERED_S)
        back.append(max(event.at for event in served) - since)
        field.wait_until_each_has(field.fair(), since, RECOVERED_S)
    field.judge()
    row.figures |= {"taken over": spread(took), "back": spread(back)}
    row.worst = max(took)
    row.measured = f"{spread(took)}; back after {max(back):.1f} s at most"
    assert max(took) <= TAKEN_OVER_S


@pytest.mark.row(
    "host-without-power",
    "a host loses its power: nobody is told, 3 times",
    f"the others have its capacity ≤ {TRUST_S + 5:g} s",
)
def test_a_host_without_power_leaves_its_capacity_to_the_others(field: World, row: Row) -> None:
    """Its sessions stay on the server, which hears nothing: not even that they have ended."""
    silence(field, row, Host.lose_power, None, scale(1, 3))


@pytest.mark.row(
    "host-frozen",
    f"a host frozen for {SILENT_S:g} s, then it goes on, 3 times",
    f"the others have its capacity ≤ {TRUST_S + 5:g} s",
)
def test_a_frozen_host_does_not_exceed_the_limit_when_it_goes_on(field: World, row: Row) -> None:
    silence(field, row, Host.freeze, Host.thaw, scale(1, 3))


@pytest.mark.row(
    "host-paused",
    f"a host frozen and cut off at once for {SILENT_S:g} s, as a virtual machine is, 3 times",
    f"the others have its capacity ≤ {TRUST_S + 5:g} s",
)
def test_a_paused_host_does_not_exceed_the_limit_when_it_goes_on(field: World, row: Row) -> None:
    """A frozen host's kernel acknowledges what the server sends; a paused machine's does not."""

    def pause(host: Host) -> float:
        host.cable.cut()
        return host.freeze()

    def resume(host: Host) -> None:
        host.cable.heal()
        host.thaw()

    silence(field, row, pause, resume, scale(1, 3))


@pytest.mark.row(
    "host-cut-off",
    f"a host's network cut for {SILENT_S:g} s and healed, 3 times",
    f"the others have its capacity ≤ {TRUST_S + 5:g} s",
)
def test_a_host_that_was_cut_off_does_not_exceed_the_limit_when_it_is_back(
    field: World, row: Row
) -> None:
    silence(field, row, lambda host: host.cut(), lambda host: host.cable.heal(), scale(1, 3))


@pytest.mark.row(
    "host-broker-frozen",
    f"the broker of a host frozen for {SILENT_S:g} s, its workers not, 3 times",
    f"the others have its capacity ≤ {TRUST_S + 5:g} s",
)
def test_a_frozen_broker_of_one_host_does_not_exceed_the_limit_when_it_goes_on(
    field: World, row: Row
) -> None:
    """Its workers use what they hold, until others wait for it and the trust window has passed."""
    silence(
        field,
        row,
        lambda host: field.signal_broker(host, signal.SIGSTOP),
        lambda host: field.signal_broker(host, signal.SIGCONT),
        scale(1, 3),
    )


@pytest.mark.row(
    "host-broker-killed",
    "the broker of a host SIGKILLed under load, 30 times",
    "no failed statement; its workers served again p99 ≤ 5 s",
)
def test_a_killed_broker_of_one_host_breaks_nothing(field: World, row: Row) -> None:
    """Served again: until each worker of the host has a connection it asked for after the kill."""
    rng = random.Random(row.seed)
    hosts = field.open()
    back = []
    for _ in range(scale(3, 30)):
        host = rng.choice(hosts)
        let_pass(rng.uniform(0.2, 1.0))
        at = field.signal_broker(host, signal.SIGKILL)
        row.faults += 1
        served = field.working[host.name].wait_for("ask", at, 30)
        served = field.working[host.name].wait_for("out", max(event.at for event in served), 30)
        back.append(max(event.at for event in served) - at)
        wait_until(lambda host=host: field.brokers_of(host), 30, "the next broker of the host")
    field.wait_until_each_has(field.fair(), field.clock(), 30)
    found = field.judge()
    broken = [error for checkout in found for error in checkout.errors]
    row.figures |= {"back": spread(back), "broken": len(broken)}
    row.worst = percentile(back, 99)
    row.measured = f"{row.faults} kills; failed statements {len(broken)}; back {spread(back)}"
    assert not broken, f"statements failed: {broken[:5]}"
    assert percentile(back, 99) <= scale(8.0, 5.0)


@pytest.mark.row(
    "host-joins-and-leaves",
    "a host joins and leaves under load, 10 times",
    "it has its fair share ≤ 5 s after its workers ask; the others have it back ≤ 5 s",
)
def test_a_host_joins_and_leaves_under_load(field: World, row: Row) -> None:
    """Joined: from the first request of its workers until all hosts have their fair share. Left:
    from the end of its last worker until the others have all; its broker lives on for a while, with
    nothing to do."""
    hosts = field.open(HOSTS - 1)
    newcomer = field.lab.add_host("newcomer")
    joined, left = [], []
    for _ in range(scale(2, 10)):
        field.wait_until_full(hosts, field.clock(), 30)
        crew = field.join(newcomer, WORKERS)
        asked = min(event.at for event in crew.wait_for("ask", timeout_s=60))
        joined.append(field.wait_until_each_has(field.fair(), asked, 60) - asked)
        let_pass(1.0)
        field.leave(newcomer)
        since = field.clock()
        left.append(field.wait_until_full(hosts, since, 60) - since)
        row.faults += 2
    found = field.judge()
    broken = [error for checkout in found for error in checkout.errors]
    row.figures |= {"joined": spread(joined), "left": spread(left)}
    row.worst = max(joined + left)
    row.measured = f"joined {spread(joined)}; left {spread(left)}"
    assert not broken, f"statements failed: {broken[:5]}"
    assert max(joined + left) <= scale(10.0, 5.0)
