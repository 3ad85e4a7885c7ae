"""Fixtures of the ledger's tests."""

from __future__ import annotations

import pytest

from tests.unit.ledger_driver import Broker


@pytest.fixture
def broker() -> Broker:
    return Broker()
