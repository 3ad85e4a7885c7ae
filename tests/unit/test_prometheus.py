"""The text that Prometheus reads, by Prometheus's own parser."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from sharedpool.broker.core.histograms import Histograms
from sharedpool.broker.core.snapshot import History, Snapshot
from sharedpool.broker.metrics.prometheus import render
from sharedpool.wire.buckets import BOUNDS_S, BUCKETS
from sharedpool.wire.reports import PoolReport, Report
from sharedpool.wire.values import Histogram, Timings


def observation(*pools: tuple[str, Histograms]) -> Snapshot:
    counts: dict[str, Any] = {
        "sessions": 1,
        "leases": 9,
        "granted": 1,
        "in_use": 4,
        "idle": 2,
        "closing": 1,
        "suspect": 1,
        "fencing": 0,
    }
    counters: dict[str, Any] = dict.fromkeys(
        ("grants", "waits", "denials", "timeouts", "recalls", "fences"), 7
    )
    reports = [
        PoolReport(name=name, server="server", max_conn=5, waiting=3, **counts, **counters)
        for name, _ in pools
    ]
    report = Report(3, 17, 4711, "ipc:///x", 61_500, 20, 9, "connected", reports, [])
    return Snapshot(
        report, [(one, totals) for one, (_, totals) in zip(reports, pools, strict=True)], []
    )


def samples(seen: Snapshot) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = {}
    for family in text_string_to_metric_families(render(seen)):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


# What `config_pool` refuses, a worker that is not ours might still send.
@settings(deadline=None)
@given(names=st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True, max_size=4))
def test_whatever_a_pool_is_called_it_is_one_label(names: list[str]) -> None:
    found = samples(observation(*[(name, Histograms()) for name in names]))
    limits = {
        dict(labels)["db_client_connection_pool_name"]
        for name, labels in found
        if name.endswith("ection_max")
    }
    assert limits == set(names)


def test_a_histogram_is_cumulative_and_in_seconds() -> None:
    totals = Histograms()
    counts = list(range(1, BUCKETS + 1))
    nothing = Histogram([0] * BUCKETS, 0)
    totals.note(None, Timings(1, nothing, Histogram(counts, 2_500_000), nothing))
    found = samples(observation(("p", totals)))
    pool = ("db_client_connection_pool_name", "p")
    name = "db_client_connection_wait_time_seconds"
    for number, bound in enumerate(BOUNDS_S):
        assert found[name + "_bucket", frozenset({pool, ("le", str(bound))})] == sum(
            counts[: number + 1]
        )
    assert found[name + "_bucket", frozenset({pool, ("le", "+Inf")})] == sum(counts)
    assert found[name + "_count", frozenset({pool})] == sum(counts)
    assert found[name + "_sum", frozenset({pool})] == 2.5


def test_a_broker_that_nobody_uses_tells_of_itself() -> None:
    found = samples(observation())
    assert found["sharedpool_broker_epoch", frozenset()] == 17
    assert found["sharedpool_broker_uptime_seconds", frozenset()] == 61.5
    assert found["sharedpool_broker_serving", frozenset()] == 1
    assert not any(labels for _, labels in found)


def test_the_history_has_half_an_hour_of_the_pools_there_are() -> None:
    history = History()
    for n in range(400):
        history.add(observation(("a", Histograms()), ("b", Histograms())), n * 5.0)
    assert {name: len(points) for name, points in history.ages(2000.0).items()} == {
        "a": 360,
        "b": 360,
    }
    assert history.ages(2000.0)["a"][-1] == (
        5.0,
        4,
        9,
        3,
        5,
    )  # seconds ago, in use, leases, waiting, limit
    assert history.ages(2000.0)["a"][0][0] == 1800.0
    history.add(observation(("a", Histograms())), 2000.0)
    assert list(history.ages(2000.0)) == ["a"]
