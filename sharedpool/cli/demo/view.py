"""The output of `sharedpool demo`: a view of the running pool, and a summary with its verdict.

`judge` and the functions that make text are pure. rich is imported only where it draws, because it
belongs to the `demo` extra, and because the demo's worker processes import this module, too.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, Self

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

_BAR_CELLS = 50
_HISTORY = 240  # throughput samples kept for the sparkline
_SPARK = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Moment:
    """The pool at one instant."""

    elapsed_s: float
    seconds: float  # how long the demo runs
    workers: int
    limit: int
    # Leases as the broker counts them, if it answers.
    in_use: int = 0
    idle: int = 0
    connecting: int = 0
    closing: int = 0
    unsure: int = 0  # suspect, or being fenced
    waiting: int = 0
    recalls: int = 0
    # Connections as PostgreSQL counts them.
    server_now: int = 0
    server_peak: int = 0
    samples: int = 0
    # As the workers report.
    committed: int = 0
    per_second: float = 0.0
    errors: int = 0
    answering: bool = True  # the broker

    @property
    def leases(self) -> int:
        return self.in_use + self.idle + self.connecting + self.closing + self.unsure


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of a run."""

    workers: int
    max_conn: int
    elapsed_s: float
    peak: int  # most connections that the server had in a sample
    samples: int
    gap_ms: float  # longest time between two samples
    committed: int  # transfers, as the workers count them
    transfers: int  # as the table counts them
    idle_workers: int  # that committed nothing
    wait_p50_ms: float
    wait_p99_ms: float
    recalls: int
    errors: dict[str, int]
    balance_before: int
    balance_after: int


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition that a run must meet."""

    name: str
    holds: bool
    detail: str


def judge(summary: Summary) -> list[Condition]:
    """Return the conditions for a good run, and whether this run meets them.

    A peak of 0 is bad, too: nothing was sampled, or nothing ran.
    """
    s = summary
    errors = ", ".join(f"{count} x {name}" for name, count in sorted(s.errors.items())) or "none"
    return [
        Condition(
            "server connections never above the limit",
            0 < s.peak <= s.max_conn,
            f"peak {s.peak}, limit {s.max_conn}, {s.samples} samples",
        ),
        Condition(
            "total balance unchanged",
            s.balance_before == s.balance_after,
            f"{s.balance_before} before, {s.balance_after} after",
        ),
        Condition(
            "no transaction lost or doubled",
            s.committed == s.transfers,
            f"{s.committed} by the workers, {s.transfers} by the table",
        ),
        Condition("no errors", not s.errors, errors),
        Condition(
            "every process committed something",
            s.idle_workers == 0,
            f"{s.workers - s.idle_workers} of {s.workers}",
        ),
    ]


def as_document(summary: Summary) -> dict[str, object]:
    """Return the summary for `--json`."""
    conditions = judge(summary)
    return {
        **asdict(summary),
        "conditions": [asdict(condition) for condition in conditions],
        "passed": all(condition.holds for condition in conditions),
    }


def as_text(summary: Summary) -> str:
    """Return the summary for a reader."""
    s = summary
    reached = "" if s.peak >= s.max_conn else " (never reached: try more --workers)"
    rows = [
        ("server connections", f"peak {s.peak}, limit {s.max_conn}{reached}"),
        ("", f"{s.samples} samples of pg_stat_activity, at most {s.gap_ms:.0f} ms apart"),
        ("transactions", f"{s.committed} ({s.committed / s.elapsed_s:.0f} a second)"),
        ("wait for a connection", f"p50 {s.wait_p50_ms:.2f} ms, p99 {s.wait_p99_ms:.1f} ms"),
        ("recalls", f"{s.recalls} connections given back because others waited"),
        (
            "errors",
            ", ".join(f"{count} x {name}" for name, count in sorted(s.errors.items())) or "none",
        ),
        ("total balance", f"{s.balance_before} before, {s.balance_after} after"),
    ]
    return "\n".join(
        [
            f"{s.workers} processes, {s.max_conn} connections, {s.elapsed_s:.1f} s",
            "",
            *(f"  {name:<24}{value}".rstrip() for name, value in rows),
            "",
            *(f"{'PASS' if c.holds else 'FAIL'}  {c.name}: {c.detail}" for c in judge(summary)),
        ]
    )


class View(Protocol):
    """Shows moments while its `with` block runs."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def show(self, moment: Moment) -> None:
        """Show the moment. Called some times a second."""


def choose_view(plain: bool) -> View:
    """Return the live view if there are a terminal and rich, or else plain lines."""
    is_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    if plain or not is_terminal or importlib.util.find_spec("rich") is None:
        return PlainView()
    from rich.console import Console

    console = Console(stderr=True)  # stdout is for the summary only
    return PlainView() if console.is_dumb_terminal else LiveView(console)


class PlainView:
    """One line a second on stderr."""

    def __init__(self) -> None:
        self._due_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, moment: Moment) -> None:
        """Print the moment if a second has passed since the last one."""
        if moment.elapsed_s >= self._due_s:
            self._due_s = int(moment.elapsed_s) + 1.0
            click.echo(plain_line(moment), err=True)


def plain_line(m: Moment) -> str:
    """Return the moment as one line."""
    unsure = f", {m.unsure} unsure" if m.unsure else ""
    errors = f" · {m.errors} ERRORS" if m.errors else ""
    leases = (
        f"{m.leases} of {m.limit} leases ({m.in_use} in use, {m.idle} idle,"
        f" {m.connecting} connecting, {m.closing} closing{unsure}) · {m.waiting} waiting"
    )
    return (
        f"{m.elapsed_s:5.1f} s · {leases if m.answering else 'the broker does not answer'}"
        f" · server: {m.server_now} now, peak {m.server_peak} · {m.per_second:.0f} tx/s"
        f" · {m.recalls} recalls{errors}"
    )


class LiveView:
    """A panel that is redrawn in place. At the end it stays on the screen."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._unicode = console.encoding.lower().startswith("utf")
        # No refresh thread: the demo draws when it has news, and no signal interrupts that.
        self._live = Live(console=console, auto_refresh=False)
        self._history: deque[float] = deque(maxlen=_HISTORY)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, moment: Moment) -> None:
        """Redraw."""
        self._history.append(moment.per_second)
        self._live.update(panel(moment, self._history, self._unicode), refresh=True)


def panel(m: Moment, history: Sequence[float], unicode: bool = True) -> RenderableType:
    """Return the picture of a moment: 14 rows that fit into 80 columns."""
    from rich import box
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    block, light = ("█", "░") if unicode else ("#", ".")
    parts = [
        ("in use", m.in_use, "green"),
        ("idle", m.idle, "cyan"),
        ("connecting", m.connecting, "yellow"),
        ("closing", m.closing, "magenta"),
        ("unsure", m.unsure, "red"),
    ]
    legend = Text()
    for name, count, style in parts:
        if count or name != "unsure":
            legend.append(f"{block} ", style).append(f"{name} {count}  ")
    free = max(0, m.limit - m.leases)
    legend.append(f"{light} ", "dim").append(f"free {free}")
    if not m.answering:
        legend = Text("the broker does not answer", "bold red")
    server = [("", m.server_now, "green" if m.server_now <= m.limit else "bold red")]
    over = m.server_peak > m.limit
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_row("leases", _bar(parts, m.limit, block, light).append(f" {m.leases} of {m.limit}"))
    grid.add_row("", legend)
    grid.add_row()
    grid.add_row(
        "server", _bar(server, m.limit, block, light).append(f" {m.server_now} of {m.limit}")
    )
    peak = Text(f"peak {m.server_peak}", "bold red" if over else "bold green")
    grid.add_row(
        "", peak.append(f" in {m.samples} samples of pg_stat_activity", "not bold default")
    )
    grid.add_row()
    waiting = Text((block if unicode else "*") * min(m.waiting, _BAR_CELLS), "yellow")
    grid.add_row(
        "waiting",
        waiting.append(f"{' ' if m.waiting else ''}{m.waiting} for a connection", "default"),
    )
    grid.add_row("recalls", f"{m.recalls}")
    grid.add_row()
    grid.add_row("transfers", f"{m.committed}, {m.per_second:.0f} a second")
    grid.add_row("", Text(_sparkline(history) if unicode else "", "blue"))
    grid.add_row("errors", Text(str(m.errors), "bold red" if m.errors else "default"))
    return Panel(
        grid,
        title=f"{m.workers} processes share {m.limit} connections",
        subtitle=f"{m.elapsed_s:.1f} of {m.seconds:g} s · Ctrl-C ends it",
        box=box.ROUNDED if unicode else box.ASCII,
        width=76,  # leaves room for the terminal's own "^C"
    )


def _bar(parts: Sequence[tuple[str, int, str]], limit: int, block: str, light: str) -> Text:
    """Draw counts as a bar of at most `_BAR_CELLS` cells.

    All slots have the same width, in whole cells where the limit is small enough for that.
    """
    from rich.text import Text

    total = max(limit, sum(count for _, count, _ in parts))
    scale = _BAR_CELLS // total if total <= _BAR_CELLS else _BAR_CELLS / total
    bar, filled, drawn = Text(), 0, 0
    for _, count, style in parts:
        filled += count
        cells = round(filled * scale) - drawn
        bar.append(block * cells, style)
        drawn += cells
    return bar.append(light * (round(total * scale) - drawn), "dim")


def _sparkline(history: Sequence[float]) -> str:
    """Draw the history as one row, the newest at the right, averaged to `_BAR_CELLS` cells."""
    values = list(history)
    if len(values) > _BAR_CELLS:
        step = len(values) / _BAR_CELLS
        cuts = [round(i * step) for i in range(_BAR_CELLS + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    top = max(values, default=0) or 1
    return "".join(_SPARK[min(len(_SPARK) - 1, int(value / top * len(_SPARK)))] for value in values)


class Rate:
    """Transactions per second over the last second."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque()

    def of(self, count: int) -> float:
        """Record the total so far, and return the rate."""
        now = time.monotonic()
        self._counts.append((now, count))
        while now - self._counts[0][0] > 1:
            self._counts.popleft()
        then, before = self._counts[0]
        return (count - before) / (now - then) if now - then > 0.2 else 0.0
