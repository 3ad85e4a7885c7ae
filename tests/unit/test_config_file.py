"""A broker's configuration file: what it may say, and that every mistake in it is named with its
place."""

from __future__ import annotations

from pathlib import Path

import pytest

from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.launch.config_file import read
from sharedpool.errors import ConfigError


def test_everything_a_file_may_say(tmp_path: Path) -> None:
    path = tmp_path / "sharedpool.toml"
    path.write_text(
        """
        max_conn = 20
        expiration = 60
        max_checkout = 30.5
        dsn = "dbname=app"
        ttl = 15
        metrics = "127.0.0.1:9187"
        bind = "ipc:///run/sharedpool/broker.sock"
        linger = 10
        drain_timeout = 5

        [pools.reports]
        max_conn = 5

        [groups.web]
        min = 8
        priority = 10

        [groups.celery]
        max = 10
        """
    )
    found = read(path)
    assert found.options == {
        "max_conn": 20,
        "expiration": 60.0,
        "max_checkout": 30.5,
        "dsn": "dbname=app",
        "ttl": 15.0,
        "metrics": "127.0.0.1:9187",
        "bind": "ipc:///run/sharedpool/broker.sock",
        "linger": 10.0,
        "drain_timeout": 5.0,
    }
    assert found.groups == {"web": GroupTerms(8, None, 10), "celery": GroupTerms(0, 10, 0)}
    assert found.limits == {"reports": 5}


def test_every_mistake_is_named_at_once_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "sharedpool.toml"
    path.write_text(
        'max_conn = "many"\nmax_con = 3\nexpiration = -1\n[groups.web]\nmin = -1\n[groups.b]\n'
        "most = 1\n[pools.x]\n"
    )
    with pytest.raises(ConfigError) as caught:
        read(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert [line.removeprefix(f"{path}: ").partition(":")[0] for line in lines] == [
        "expiration", "groups.b", "groups.web.min", "max_con", "max_conn", "pools.x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = = 1", "line 1"),
        ("groups = 3", "groups: must be tables"),
        (
            "max_conn = 3\n[groups.web]\nmin = 4",
            "4 connections are reserved (min), of 3 in all (max-conn)",
        ),
        ("max_conn = true", "max_conn: Expected `int`"),
    ],
)
def test_senseless_values_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "sharedpool.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert expected in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'dsn = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml"):
        read(tmp_path / "latin.toml")
