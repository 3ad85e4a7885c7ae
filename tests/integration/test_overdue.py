"""Connections that are checked out for too long: reported, counted, and ended where
that is wanted."""

from __future__ import annotations

from typing import Any

import pytest

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.processes import Worker
from tests.support.waiting import wait_until


@pytest.mark.parametrize("action", ["report", "end"])
def test_a_leak_is_counted_and_its_slot_had_back_where_that_is_wanted(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, action: str
) -> None:
    name = f"overdue {action}"
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 2,
    }
    with (
        Worker(**settings, max_checkout=0.3, max_checkout_action=action) as leaky,
        Worker(**settings) as other,
    ):
        leaky.ask("get", name="leaked", timeout=10)

        def overdue() -> int:
            return sum(
                pool.overdue for pool in fetch_report(broker.address).pools if pool.name == name
            )

        # What is checked in and out again all the time is not the same checkout.
        for _ in range(20):
            other.ask("get", name="short", timeout=10)
            other.ask("query", name="short", sql="SELECT pg_sleep(0.05)")
            other.ask("put", name="short")
        wait_until(lambda: overdue() == 1, 10, "the leak to be noticed")
        outcome = leaky.ask("query", name="leaked", sql="SELECT 1")
        assert ("error" in outcome) is (action == "end")
        if action == "end":
            both = [other.ask("get", name=each, timeout=10) for each in "ab"]
            assert all("backend" in each for each in both)
