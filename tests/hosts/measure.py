"""Measure what several hosts cost: `python -m tests.hosts.measure`, as root, from the top folder.

- *moves*: all of the limit lies idle on one host, and a worker of another host asks for one
  connection.
- *contention*: the same workers under the same load, on three hosts and on one, in turn.
- *rest*: how many transactions a host has for itself while no worker does anything.

It prints a table of Markdown, and the figures as JSON with `--out`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from tests.faults.results import Row, new_seed, percentile
from tests.faults.schedule import let_pass
from tests.hosts.crews import Crew
from tests.hosts.lab import missing
from tests.hosts.world import MAX_CONN, World, world

_WARM_S = 1.0
_COUNTED_S = 15.0


def row(name: str) -> Row:
    return Row(name, "", "", "", new_seed())


def milliseconds(waits: Iterable[float]) -> dict[str, float]:
    """Return p50, p99 and the maximum."""
    found = sorted(waits)
    return {f"p{p}": round(percentile(found, p) * 1e3, 2) for p in (50, 99, 100)} | {
        "n": len(found)
    }


def moves(rounds: int, pause_s: float) -> dict[str, Any]:
    """Measure how long a host waits for a connection that another has idle; both in turn.

    `pause_s` before each: the rate of the syncs is limited, and what demand that changes all the
    time waits for is the rate.
    """
    with world(row("moves")) as field:
        field.prepare()
        hosts = [field.lab.add_host(name) for name in ("a", "b")]
        workers = [field.crews.start(host, 1, "p").numbers[0] for host in hosts]
        field.crews.wait_for(workers, "paused", timeout_s=60)
        first: list[float] = []
        filled: list[float] = []
        for turn in range(-2, rounds):  # two to warm up: brokers and connections are new then
            idle, asking = workers[turn % 2], workers[(turn + 1) % 2]
            for number, order, noted in ((idle, "k", filled), (asking, "1", first)):
                let_pass(pause_s)
                since = field.clock()
                field.crews.order([number], order)
                field.crews.wait_until_done(number)
                events = [event for event in field.crews.events(number) if event.at >= since]
                asked, out = (
                    [event.at for event in events if event.kind == kind] for kind in ("ask", "out")
                )
                assert len(asked) == len(out), [e for e in events if e.kind == "fail"][:3]
                if turn >= 0:
                    noted.append(out[-1] - asked[0])
        field.crews.dismiss()
        peak = field.backends.timeline.peak
    return {"first": milliseconds(first), "all": milliseconds(filled), "peak": peak}


def contention(rounds: int, seconds: float, hosts: int, workers: int) -> dict[str, Any]:
    """Measure the same load on several hosts and on one, in turn, on one server."""
    with world(row("contention")) as field:
        field.prepare(think_s=0.0, work_s=0.004, timeouts=[10])
        many = [
            field.crews.start(field.lab.add_host(f"host{number}"), workers, "p")
            for number in range(hosts)
        ]
        one = [field.crews.start(field.lab.add_host("one"), hosts * workers, "p")]
        for crew in (*many, *one):
            crew.wait_for("paused", timeout_s=60)
        sides = {"many": many, "one": one}
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, crews in sides.items():
                turns[name].append(load(field, crews, seconds))
        field.crews.dismiss()
        peak = field.backends.timeline.peak
        found = field.crews.checkouts()
    measured: dict[str, Any] = {"peak": peak}
    for name, crews in sides.items():
        numbers = {str(number) for crew in crews for number in crew.numbers}
        mine = [c for c in found if c.worker in numbers and c.answered is not None]
        rates, waited = [], []
        for begin, end in turns[name]:
            served = [c for c in mine if c.backend and begin <= (c.answered or 0) < end]
            rates.append(len(served) / (end - begin))
            waited += [c.waited for c in served]
        measured[name] = {"rates": [round(rate, 1) for rate in rates]} | milliseconds(waited)
        measured[name]["failed"] = sum(not c.backend for c in mine)
    pairs = zip(measured["many"]["rates"], measured["one"]["rates"], strict=True)
    measured["ratio"] = round(median(many / one for many, one in pairs), 3)
    return measured


def rest(seconds: float, hosts: int, workers: int) -> dict[str, Any]:
    """Count the transactions in the pool's database while nobody works.

    Idle connections lie on all hosts.
    """
    with world(row("rest")) as field:
        field.open(hosts, workers)
        field.crews.quiet()
        # What has just been used may move once more. And a backend that has become idle counts its
        # last transactions only ten seconds later (PGSTAT_IDLE_INTERVAL).
        let_pass(_COUNTED_S)
        before, begin = field.transactions(), field.clock()
        let_pass(seconds)
        after, end = field.transactions(), field.clock()
        field.crews.dismiss()
        peak = field.backends.timeline.peak
    rate = (after - before) / (end - begin) / hosts
    return {"rate": round(rate, 3), "seconds": round(end - begin, 1), "peak": peak}


def load(field: World, crews: list[Crew], seconds: float) -> tuple[float, float]:
    """Have these workers work, and nobody else; return from when to when it counts.

    That is not before they have all of the capacity: how fast it moves is measured by itself.
    """
    since = field.clock()
    for crew in crews:
        crew.order("r")
    workers = sum(len(crew.numbers) for crew in crews)
    addresses = [crew.host.address for crew in crews]
    field.backends.wait_for_sum(addresses, min(field.max_conn, workers), since, 60)
    let_pass(_WARM_S)
    begin = time.monotonic()
    let_pass(seconds)
    end = time.monotonic()
    field.crews.quiet()
    return begin, end


def table(figures: dict[str, Any]) -> str:
    lines = ["| | measured |", "|---|---|"]
    if found := figures.get("moves"):
        for what, key in (("one connection", "first"), (f"all {MAX_CONN}", "all")):
            p = found[key]
            lines.append(
                f"| {what}, idle on another host | p50 {p['p50']} ms, p99 {p['p99']} ms,"
                f" max {p['p100']} ms (n={p['n']}) |"
            )
        lines.append(f"| most connections at once, of {MAX_CONN} | {found['peak']} |")
    if found := figures.get("contention"):
        for name in ("many", "one"):
            p = found[name]
            lines.append(
                f"| {name} | {median(p['rates']):.0f}/s; p50 {p['p50']} ms, p99 {p['p99']} ms,"
                f" failed {p['failed']} |"
            )
        lines.append(f"| ratio | {found['ratio']} |")
        lines.append(f"| most connections at once, of {MAX_CONN} | {found['peak']} |")
    if found := figures.get("rest"):
        lines.append(f"| transactions of a host at rest | {found['rate']}/s |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("moves", "contention", "rest"))
    parser.add_argument("--moves", type=int, default=100, help="how many moves")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds before each")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side of contention")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long a turn lasts")
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--workers", type=int, default=8, help="on each host")
    parser.add_argument("--out", type=Path, help="a file for the figures")
    options = parser.parse_args()
    if lacking := missing():
        print(lacking, file=sys.stderr)
        return 3
    size = (options.hosts, options.workers)
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "moves": lambda: moves(options.moves, options.pause),
        "contention": lambda: contention(options.rounds, options.seconds, *size),
        "rest": lambda: rest(2 * options.seconds, *size),
    }
    chosen = [options.only] if options.only else list(measures)
    figures = {name: measures[name]() for name in chosen}
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))
    exceeded = [name for name, found in figures.items() if found["peak"] > MAX_CONN]
    if exceeded:
        print(f"the limit was exceeded: {', '.join(exceeded)}: these are no figures")
    return int(bool(exceeded))


if __name__ == "__main__":
    sys.exit(main())
