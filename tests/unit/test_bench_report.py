"""The benchmark's figures: what it makes of the values, and the tables of them."""

import json

import pytest

from tests.bench.peers import Shared, Unavailable
from tests.bench.report import (
    FAIRNESS,
    MEAN_US,
    P50_MS,
    P99_MS,
    THROUGHPUT,
    Comparison,
    Metric,
    Result,
    Sample,
    as_json,
    details,
    markdown,
    summary,
)
from tests.bench.stats import Spread, curve, fairness, percentile, ratios, spread

# --- statistics


def test_the_spread_is_from_the_least_to_the_greatest() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread([4.0]) == Spread(4.0, 4.0, 4.0)
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_ratios_are_taken_round_by_round() -> None:
    # The machine was half as fast in the second round: for both.
    assert ratios([100.0, 50.0], [200.0, 100.0]) == [0.5, 0.5]
    assert ratios([100.0, 50.0], [0.0, 100.0]) == [0.5]
    assert ratios([100.0, 50.0], [200.0]) == [0.5]  # the peer failed in the second


@pytest.mark.parametrize(
    ("percent", "expected"),
    [(50, 50.0), (99, 99.0), (99.9, 100.0), (100, 100.0), (0, 1.0), (1, 1.0)],
)
def test_a_percentile_is_one_of_the_values(percent: float, expected: float) -> None:
    assert percentile([float(n) for n in range(100, 0, -1)], percent) == expected


def test_a_percentile_of_few_values_is_the_greatest() -> None:
    assert percentile([7.0], 1) == percentile([7.0], 99) == 7.0
    assert percentile([1.0, 2.0], 99) == 2.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_fairness_is_the_least_by_the_greatest() -> None:
    assert fairness([5, 10, 7]) == 0.5
    assert fairness([0, 10]) == 0.0
    assert fairness([0, 0]) == 0.0
    with pytest.raises(ValueError, match="no counts"):
        fairness([])


def test_a_curve_rises_to_the_greatest_value() -> None:
    steps = curve([float(n) for n in range(10_000)])
    assert steps == sorted(steps)
    assert steps[-1] == (9999.0, 1.0)
    assert len(steps) <= 401
    assert curve([]) == []
    assert curve([3.0])[-1] == (3.0, 1.0)


# --- what a row has measured


@pytest.fixture
def result() -> Result:
    """A row with two rounds of two contestants, and one contestant that could not be had."""
    comparisons = (
        Comparison(THROUGHPUT, "Peer"),
        Comparison(P99_MS, "Peer"),
        Comparison(THROUGHPUT, "Absent"),
    )
    row = Result("contended", "many on few", "throughput ≥ 1.15 × Peer", comparisons)
    for ours, theirs in ((1100.0, 1000.0), (600.0, 500.0)):
        row.add("sharedpool", Sample({THROUGHPUT: ours, P99_MS: 4.0, FAIRNESS: 0.75}, [1.0, 4.0]))
        row.add("Peer", Sample({THROUGHPUT: theirs, P99_MS: 8.0}, [2.0, 8.0]))
    row.unmeasured["Absent"] = "no program `absent` | install it"
    return row


def test_the_summary_compares_with_each_peer_and_says_what_is_missing(result: Result) -> None:
    *_, line = summary([result]).splitlines()
    assert line == (
        "| many on few (`contended`) | throughput ≥ 1.15 × Peer | throughput 1.15 × (1.10–1.20) "
        "Peer"
        "<br>p99 0.50 × (0.50–0.50) Peer<br>fairness 0.75 (0.75–0.75)"
        "<br>Absent: not measured (no program `absent` \\| install it) |"
    )


def test_the_summary_of_a_row_without_peers_has_the_figures_themselves() -> None:
    row = Result("recall", "recall latency")
    row.add("sharedpool", Sample({P50_MS: 0.5}))
    row.add("sharedpool, handover off", Sample({P50_MS: 8.0}))
    assert summary([row]).endswith("| – | p50 0.50 ms<br>sharedpool, handover off: p50 8.00 ms |")


def test_a_comparison_of_others_names_them() -> None:
    row = Result("select", "a query", comparisons=(Comparison(MEAN_US, "direct", "PgBouncer"),))
    row.add("direct", Sample({MEAN_US: 20.0}))
    row.add("PgBouncer", Sample({MEAN_US: 50.0}))
    assert "PgBouncer: mean 2.50 × (2.50–2.50) direct" in summary([row])


def test_the_details_have_a_line_for_everybody(result: Result) -> None:
    lines = details([result]).splitlines()[2:]
    assert lines == [
        "| contended | sharedpool | throughput 850 /s (600–1,100) · p99 4.00 ms (4.00–4.00)"
        " · fairness 0.75 (0.75–0.75) |",
        "| contended | Peer | throughput 750 /s (500–1,000) · p99 8.00 ms (8.00–8.00) |",
        "| contended | Absent | not measured: no program `absent` \\| install it |",
    ]


def test_a_failed_row_keeps_its_figures_and_tells_its_error(result: Result) -> None:
    result.error = "Traceback (most recent call last):\n  ...\nValueError: a | b\n"
    text = markdown({"Python": "3.11"}, "how it was run", [result])
    assert "throughput 1.15 × (1.10–1.20) Peer" in text
    assert "**failed**: ValueError: a \\| b |" in text
    assert "| contended | – | failed: ValueError: a \\| b |" in text
    assert "Traceback (most recent call last)" in text


def test_every_line_of_a_table_has_as_many_cells(result: Result) -> None:
    for table in (summary([result]), details([result])):
        assert {line.replace("\\|", "").count("|") for line in table.splitlines()} == {4}


def test_the_machine_the_run_and_the_notes_are_told(result: Result) -> None:
    result.notes.append("a remark")
    text = markdown({"commit": "abc", "CPUs": "2"}, "how it was run", [result])
    assert "how it was run" in text
    assert "commit abc, CPUs 2" in text
    assert "- `contended`: a remark" in text


def test_the_json_has_every_round_and_the_ratios(result: Result) -> None:
    (row,) = json.loads(as_json({"CPUs": "2"}, "how", [result]))["rows"]
    assert row["contestants"]["sharedpool"]["throughput"] == {
        "unit": "/s",
        "rounds": [1100.0, 600.0],
    }
    first, second = row["ratios"]
    assert (first["metric"], first["of"], first["to"]) == ("throughput", "sharedpool", "Peer")
    assert first["median"] == pytest.approx(1.15)
    assert second["median"] == 0.5
    assert row["latencies_ms"]["Peer"]["count"] == 4
    assert row["latencies_ms"]["Peer"]["p99"] == 8.0
    assert row["unmeasured"] == {"Absent": "no program `absent` | install it"}


def test_a_metric_shows_as_many_digits_as_mean_something() -> None:
    assert Metric("requests", "/s", 0).describe([12345.6]) == "12,346 /s"
    assert FAIRNESS.describe([0.5, 0.75]) == "0.62 (0.50–0.75)"


def test_an_option_that_this_sharedpool_does_not_know_makes_no_contestant() -> None:
    Shared("dbname=x", "ipc:///x", 8, options=(("max_lifetime", 5.0),))
    with pytest.raises(Unavailable, match="has no teleport"):
        Shared("dbname=x", "ipc:///x", 8, options=(("teleport", True),))
