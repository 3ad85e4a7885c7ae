"""How long things took: what a worker counts, what it tells, and what the broker makes of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharedpool.broker.core.histograms import Histograms, waits
from sharedpool.wire import values
from sharedpool.wire.buckets import BOUNDS_S, BUCKETS
from sharedpool.worker.core.timings import SAMPLE_S, Histogram, Timings


def told(times: Timings, hits: int = 0) -> values.Timings:
    news = times.news(hits)
    assert news is not None
    return news


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [
        (0.0, 0),
        (0.0005, 0),
        (0.00051, 1),
        (0.25, 8),
        (0.5, 9),
        (60.0, BUCKETS - 2),
        (60.1, BUCKETS - 1),
    ],
)
def test_a_time_is_counted_in_the_first_bucket_whose_bound_it_does_not_exceed(
    seconds: float, bucket: int
) -> None:
    histogram = Histogram()
    histogram.add(seconds)
    assert histogram.counts == [int(n == bucket) for n in range(BUCKETS)]
    assert histogram.total_us == round(seconds * 1e6)
    assert list(BOUNDS_S) == sorted(set(BOUNDS_S))


def test_checkouts_by_the_fast_path_took_no_time() -> None:
    times = Timings()
    times.checked_out(0.02)
    waited = told(times, hits=7).waited
    assert (waited.counts[0], sum(waited.counts), waited.total_us) == (7, 8, 20_000)


def test_one_use_at_most_is_timed_in_a_sample_interval() -> None:
    times = Timings()
    assert times.choose(10.0)
    assert not times.choose(10.0 + SAMPLE_S / 2)
    assert times.choose(10.0 + SAMPLE_S * 1.01)


def test_a_timed_use_stands_for_those_since_the_last_one() -> None:
    times = Timings()
    times.checked_out(0.001)
    times.checked_in(0.003, hits=0, out=0, typical=True)
    times.checked_in(0.004, hits=50, out=2, typical=True)  # 2 of the 50 are not over
    assert sum(told(times, 50).used.counts) == 1 + 48
    times.checked_in(30.0, hits=50, out=1, typical=False)  # always timed: it stands for itself
    assert sum(told(times, 50).used.counts) == 1 + 48 + 1
    times.checked_in(0.001, hits=51, out=0, typical=True)
    used = told(times, 51).used
    assert sum(used.counts) == 52
    assert used.total_us == 3_000 + 48 * 4_000 + 30_000_000 + 2 * 1_000


@pytest.mark.parametrize("short_s", [0.0004, 0.008, 0.2])
def test_the_sample_has_the_distribution_of_all_uses(short_s: float) -> None:
    """One thread, one connection; every checkout is timed beside it, as the truth."""
    random.seed(1)
    times, truth, now, hits = Timings(), Histogram(), 0.0, 0
    times.checked_out(0.005)
    chosen = times.choose(now)
    for _ in range(20_000):
        used_s = (
            random.expovariate(1 / short_s) if random.random() < 0.995 else random.uniform(0.6, 2.0)
        )
        now += used_s
        truth.add(used_s)
        typical = used_s <= 0.5
        if chosen or not typical:
            times.checked_in(used_s, hits, 0, typical=typical)
        chosen = times.choose(
            now
        )  # at the checkin, the slow one that `next_scavenge_at` makes of it
        now += random.expovariate(1 / 0.002)
        hits += 1
    used = told(times, hits).used
    assert sum(used.counts) == pytest.approx(20_000, rel=0.01)
    assert used.total_us == pytest.approx(truth.total_us, rel=0.1)
    for bucket in range(BUCKETS):
        assert sum(used.counts[: bucket + 1]) == pytest.approx(
            sum(truth.counts[: bucket + 1]), abs=600
        )
    assert used.counts[10:] == truth.counts[10:]  # long ones are all counted


def test_nothing_is_told_when_nothing_has_changed() -> None:
    times = Timings()
    assert times.news(0) is None
    times.checked_out(0.1)
    assert times.news(0) is not None
    assert times.news(0) is None
    assert times.news(1) is not None
    assert times.news(0) is None  # a count that was kept without a lock has stepped back


def test_a_new_registration_counts_from_what_was_told_last() -> None:
    times = Timings()
    times.checked_out(0.1)
    first = told(times)
    times.checked_out(0.1)  # not told yet
    times.registered()
    times.checked_out(0.1)
    second = told(times)
    assert (sum(first.waited.counts), sum(second.waited.counts)) == (1, 2)
    assert second.serial > first.serial


def waited(serial: int, *seconds: float) -> values.Timings:
    histogram, nothing = Histogram(), values.Histogram([0] * BUCKETS, 0)
    for each in seconds:
        histogram.add(each)
    return values.Timings(
        serial, nothing, values.Histogram(histogram.counts, histogram.total_us), nothing
    )


def test_a_pools_totals_are_what_its_sessions_have_told() -> None:
    totals = Histograms()
    first, more, anew = waited(1, 0.2), waited(1, 0.2, 0.4), waited(2, 3.0)
    assert totals.note(None, first)
    assert totals.note(first, more)
    assert totals.note(more, anew)  # registered anew: counts from zero
    assert sum(totals.counts["waited"]) == 3
    assert totals.total_us["waited"] == 3_600_000


def test_a_late_or_doubled_word_changes_nothing() -> None:
    totals = Histograms()
    first, more, anew = waited(1, 0.2), waited(1, 0.2, 0.4), waited(2, 3.0)
    assert totals.note(None, more)
    assert not totals.note(more, first)
    totals.note(more, more)
    assert totals.note(more, anew)
    assert not totals.note(anew, more)
    assert sum(totals.counts["waited"]) == 3


@given(words=st.lists(st.integers(0, 9), min_size=1))
def test_in_whatever_order_words_come_the_total_is_the_newest(words: list[int]) -> None:
    totals, newest = Histograms(), None
    for word in words:
        times = waited(1, *[0.1] * word)
        if totals.note(newest, times):
            newest = times
    assert sum(totals.counts["waited"]) == max(words)


def test_waits_are_spread_over_their_buckets_without_those_of_who_has_not_waited() -> None:
    nothing = values.Histogram([0] * BUCKETS, 0)
    before = values.Timings(1, nothing, values.Histogram([7, 1] + [0] * (BUCKETS - 2), 0), nothing)
    now = values.Timings(
        1, nothing, values.Histogram([900, 3, 0, 1] + [0] * (BUCKETS - 5) + [1], 0), nothing
    )
    assert waits(before, now, 500) == pytest.approx([0.000625, 0.000875, 0.00375, 90.0])
    assert len(waits(None, now, 500)) == 5
    many = values.Timings(
        2, nothing, values.Histogram([0, 3000, 1000] + [0] * (BUCKETS - 3), 0), nothing
    )
    found = waits(now, many, 400)  # of another registration
    assert (len(found), sum(wait < 0.001 for wait in found)) == (400, 300)
