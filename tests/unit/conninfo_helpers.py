"""What the tests of conninfo share: none of the developer's settings, and the parts of what is
resolved."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from psycopg2.extensions import parse_dsn

from sharedpool.postgres.conninfo import resolve

LIBPQ_VARIABLES = [
    "PGHOST",
    "PGHOSTADDR",
    "PGPORT",
    "PGDATABASE",
    "PGUSER",
    "PGPASSWORD",
    "PGSSLMODE",
    "PGPASSFILE",
]
LIBPQ_VARIABLES += ["PGSERVICE", "PGSERVICEFILE", "PGSYSCONFDIR"]

# A busy machine is no failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def no_settings_of_the_developer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*LIBPQ_VARIABLES, "DATABASE_DSN", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(
        "HOME", str(tmp_path)
    )  # no ~/.pg_service.conf of the person who runs the tests


def parts(dsn: str | None = None, db_url: str | None = None, **rest: Any) -> dict[str, str]:
    rest.setdefault("environ", {})
    return parse_dsn(resolve(dsn, db_url, **rest).dsn)
