"""The picture of `sharedpool top`, as lines of text that have a style each. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sharedpool.cli.client import duration
from sharedpool.cli.who import Answer, server_says
from sharedpool.wire.reports import PoolReport, Report, process_name

_SPARK = "▁▂▃▄▅▆▇█"
_ASCII_SPARK = "_.-=+*%#"
# Two lines of title, a blank one, the header of the pools, and "and N more pools".
_HEADER_ROWS = 5
# Reserved for the checkouts, however many pools there are: a blank line, the header and four rows.
_CHECKOUT_ROWS = 6
_POOL_HEADER = (
    "POOL",
    "LIMIT",
    "USED",
    "IDLE",
    "OTHER",
    "WAIT",
    "P50 ms",
    "P99 ms",
    "RECALLS",
    "FENCES",
)
_LONGEST_NAME = 16
_MOST_HOSTS = 8


class Line(NamedTuple):
    """A line and its style, as rich calls it."""

    text: str
    style: str = ""


def picture(
    answer: Answer | None,
    trouble: str,
    width: int,
    height: int,
    *,
    hint: str = "",
    unicode: bool = True,
) -> list[Line]:
    """Return at most `height` lines of at most `width` characters.

    `answer` is the broker's last answer, and `trouble` the reason why there is no newer one. `hint`
    goes to the upper right.
    """
    lines = [] if answer is None else list(_title(answer.report))
    if trouble:
        lines[1:2] = [Line(trouble, "bold red")]
    if lines and hint:
        lines[0] = Line(
            lines[0].text[: max(0, width - len(hint) - 2)].ljust(width - len(hint)) + hint,
            lines[0].style,
        )
    if answer is not None:
        lines.append(Line(""))
        lines += _pools(
            answer.report.pools, max(1, (height - _HEADER_ROWS - _CHECKOUT_ROWS) // 2), unicode
        )
        lines += _hosts(answer.report)
        lines += _checkouts(answer, height - len(lines), width)
    return [Line(_cropped(line.text, width, unicode), line.style) for line in lines[:height]]


def _title(report: Report) -> Iterable[Line]:
    cap = f"{report.max_conn} over all pools" if report.max_conn else "each pool's own"
    yield Line(
        f"sharedpool broker {report.pid}, up {duration(report.uptime_ms)}, {report.state}", "bold"
    )
    yield Line(
        f"limit {cap}, {report.leases} leases; control connection: {report.control};"
        f" {report.address}",
        "dim",
    )


def _pools(pools: Sequence[PoolReport], most: int, unicode: bool) -> Iterable[Line]:
    """Return a table with two lines for each pool, the pools with the most waiters first."""
    urgent = sorted(
        pools, key=lambda pool: (-pool.waiting, -(pool.leases - pool.idle) / pool.max_conn)
    )
    shown = urgent[:most]
    cells = [
        [_cropped(pool.name, _LONGEST_NAME, unicode), *map(str, _figures(pool))] for pool in shown
    ]
    widths = [max(len(row[i]) for row in [_POOL_HEADER, *cells]) for i in range(len(_POOL_HEADER))]

    def row_of(row: Sequence[str]) -> str:
        (name, *numbers), (wide, *others) = row, widths
        return "  ".join(
            [
                name.ljust(wide),
                *(cell.rjust(width) for cell, width in zip(numbers, others, strict=True)),
            ]
        )

    yield Line(row_of(_POOL_HEADER), "reverse")
    for pool, row in zip(shown, cells, strict=True):
        used = pool.leases - pool.idle
        yield Line(
            row_of(row),
            "bold red" if pool.waiting else "bold yellow" if used >= pool.max_conn else "bold",
        )
        if pool.paused:
            yield Line("  paused: nothing is granted until `sharedpool resume`", "yellow")
        if pool.error:
            yield Line(f"  cannot open connections: {pool.error}", "red")
        else:
            yield Line(
                "  10 min " + sparkline([*pool.history, used], pool.max_conn, unicode), "cyan"
            )
    if len(pools) > most:
        yield Line(f"and {len(pools) - most} more pools", "dim")


def _hosts(report: Report) -> Iterable[Line]:
    """Return a line for each limit that is shared with other hosts."""
    for own in report.hosts:
        if own.host:
            continue
        name = own.pool or "all pools"
        if own.trouble:
            yield Line(f"{name}: {own.trouble}", "red")
            continue
        others = [host for host in report.hosts if host.host and host.pool == own.pool]
        shares = ", ".join(
            f"{host.host} {host.share} (wants {host.wanted})" for host in others[:_MOST_HOSTS]
        )
        more = len(others) - _MOST_HOSTS
        text = f"hosts of {name}: this one {own.share} (wants {own.wanted}), {shares}"
        yield Line(f"{text}, and {more} more" if more > 0 else text, "cyan")


def _figures(pool: PoolReport) -> tuple[object, ...]:
    other = pool.leases - pool.in_use - pool.idle
    waits = [_milliseconds(wait) for wait in (pool.wait_p50_us, pool.wait_p99_us)]
    return (
        pool.max_conn,
        pool.in_use,
        pool.idle,
        other,
        pool.waiting,
        *waits,
        pool.recalls,
        pool.fences,
    )


def _milliseconds(us: int) -> str:
    return "-" if us < 0 else f"{us / 1000:.1f}" if us < 100_000 else f"{us / 1000:.0f}"


def sparkline(history: Sequence[int], limit: int, unicode: bool = True) -> str:
    """Draw the use of the limit: one character for each sample, the newest at the right."""
    levels = _SPARK if unicode else _ASCII_SPARK
    top = len(levels) - 1
    # The lowest level stands for no use at all.
    return "".join(
        levels[min(top, 1 + (value * top - 1) // max(1, limit)) if value > 0 else 0]
        for value in history
    )


def _checkouts(answer: Answer, rows: int, width: int) -> Iterable[Line]:
    """Return a table of the oldest checkouts that fits into `rows` lines."""
    using = [row for row in answer.rows if row[0].state == "in use"][: max(0, rows - 2)]
    if rows < 3:
        return
    several = len(answer.report.pools) > 1
    cells = [
        [
            duration(line.age_ms),
            process_name(line.title, line.pid, line.host),
            *([line.pool[:_LONGEST_NAME]] if several else []),
            server_says(activity),
            # Of the path only the file's name fits.
            line.stack[0].rpartition("/")[2] if line.stack else activity.query if activity else "",
        ]
        for line, activity in using
    ]
    header = [
        "AGE",
        "PROCESS",
        *(["POOL"] if several else []),
        "SERVER",
        "CHECKED OUT AT, OR QUERY",
    ]
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header) - 1)]
    yield Line("")
    for i, row in enumerate([header, *cells]):
        text = "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        yield Line(text.ljust(width) if i == 0 else text, "reverse" if i == 0 else "")


def _cropped(text: str, width: int, unicode: bool) -> str:
    plain = text if text.isprintable() else repr(text)[1:-1]
    if len(plain) <= width:
        return plain
    return plain[: max(0, width - 1)] + ("…" if unicode else "~")
