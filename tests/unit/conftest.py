"""Fixtures of the ledger's tests."""

from __future__ import annotations

import pytest

from tests.unit.desk_driver import Desk
from tests.unit.ledger_driver import Broker


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def desk(broker: Broker) -> Desk:
    return Desk(broker)
