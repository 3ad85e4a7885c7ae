"""What `sharedpool top` shows: the picture of a report, in any size."""

import html
import re
from typing import Any

import pytest

from sharedpool.cli.top_view import Line, picture, sparkline
from sharedpool.cli.who import Answer
from sharedpool.wire.reports import LeaseLine, PoolReport, Report
from sharedpool.wire.values import Token
from tests.support import documents

pytest.importorskip("rich")


def pool(name: str, **more: Any) -> PoolReport:
    counts = dict.fromkeys(
        ("sessions", "granted", "closing", "suspect", "fencing", "waiting", "idle"), 0
    )
    counters = dict.fromkeys(("grants", "waits", "denials", "timeouts", "recalls", "fences"), 0)
    return PoolReport(
        **{
            "name": name,
            "server": "s",
            "max_conn": 8,
            "leases": 4,
            "in_use": 4,
            **counts,
            **counters,
            **more,
        }
    )


def shown(
    pools: list[PoolReport], leases: list[LeaseLine], width: int = 80, height: int = 24
) -> list[Line]:
    report = Report(
        3, 1, 7, "ipc:///b.sock", 61_000, 0, len(leases), "connected", pools, [], oldest=leases
    )
    return picture(Answer(report, None), "", width, height, hint="q quits")


def test_however_many_pools_there_are_the_oldest_checkouts_are_shown() -> None:
    leases = [
        LeaseLine(Token(1, i), "p1", i, "", "app.py", "T", "in use", 9000 - i) for i in range(50)
    ]
    pools = [pool(f"p{i}") for i in range(20)] + [pool("pressed", waiting=3), pool("n" * 60)]
    lines = shown(pools, leases)
    assert len(lines) == 24
    assert max(len(line.text) for line in lines) <= 80
    assert lines[4].text.startswith("pressed ")  # the first one
    assert lines[4].style == "bold red"
    assert "and 16 more pools" in [line.text for line in lines]
    assert lines[-1].text.startswith("9.0 s")
    assert sum(line.text.startswith("9.0 s") for line in lines) == 5


@pytest.mark.parametrize("width", [1, 7, 20, 80, 200])
@pytest.mark.parametrize("height", [1, 2, 5, 10, 24, 60])
def test_no_size_is_too_small(width: int, height: int) -> None:
    lines = shown(
        [pool("p", error="no\x1b[2J\nspace"), pool("q", wait_p50_us=250, wait_p99_us=1_234_500)],
        [],
        width,
        height,
    )
    assert 0 < len(lines) <= height
    assert all(len(line.text) <= width and line.text.isprintable() for line in lines)


def test_the_figures_of_a_pool_stand_under_their_names() -> None:
    busy = pool(
        "p",
        leases=7,
        idle=1,
        in_use=4,
        waiting=2,
        recalls=11,
        fences=3,
        wait_p50_us=250,
        wait_p99_us=1_234_500,
    )
    header, row = (line.text for line in shown([busy], [])[3:5])
    names = [
        "POOL",
        "LIMIT",
        "USED",
        "IDLE",
        "OTHER",
        "WAIT",
        "P50",
        "ms",
        "P99",
        "ms",
        "RECALLS",
        "FENCES",
    ]
    assert header.split() == names
    assert row.split() == ["p", "8", "4", "1", "2", "2", "0.2", "1234", "11", "3"]


def test_the_documents_show_it_with_these_columns() -> None:
    lease = LeaseLine(Token(1, 1), "p", 1, "", "app.py", "T", "in use", 9)
    headers = [
        line.text.split()
        for line in shown([pool("p"), pool("q")], [lease])
        if line.style == "reverse"
    ]
    (snapshot,) = documents.blocks(
        documents.section(documents.ON_CALL, "What is going on right now?"), ""
    )
    svg = (documents.ROOT / "examples" / "pictures" / "top.svg").read_text()
    drawn = html.unescape("\n".join(re.findall(r"<text [^>]*>([^<]*)</text>", svg)))
    assert len(headers) == 2
    for header in headers:
        assert header in [line.split() for line in snapshot.splitlines()]
        assert header in [line.split() for line in drawn.splitlines()]


def test_the_chart_shows_use_against_the_limit() -> None:
    assert sparkline([0, 1, 50, 100], 100) == "▁▂▅█"
    assert sparkline([0, 1, 2, 3, 9], 3) == "▁▄▆██"
    assert sparkline([0, 1, 50, 100], 100, unicode=False) == "_.+#"
    assert sparkline([], 5) == ""
