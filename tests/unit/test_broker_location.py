"""Where a broker is: the private directory of its files, and its address."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool import ConfigError
from sharedpool.discovery import address as addresses
from sharedpool.discovery.lock_file import BrokerLock
from tests.unit.unconnected_pools import DSN, fresh

__all__ = ["fresh"]  # pytest finds it here


def test_the_runtime_directory_is_made_private(runtime_dir: Path) -> None:
    path = addresses.runtime_dir()
    assert path == runtime_dir / "sharedpool"
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("given", [None, "missing", "a file", "relative"])
def test_without_xdg_it_is_the_users_own_under_the_temporary_directory(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: Path, given: str | None
) -> None:
    (runtime_dir / "a file").touch()
    if given is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR")
    else:
        monkeypatch.setenv(
            "XDG_RUNTIME_DIR", given if given == "relative" else str(runtime_dir / given)
        )
    monkeypatch.setenv("TMPDIR", str(runtime_dir))
    assert addresses.runtime_dir() == runtime_dir / f"sharedpool-{os.geteuid()}"


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777])
def test_another_users_runtime_directory_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As by `sudo -E`, or by `su`: what one user leaves there keeps the other out for ever."""
    theirs, temporary = runtime_dir / "theirs", runtime_dir / "temporary"
    theirs.mkdir(mode=0o700)
    temporary.mkdir(mode=0o700)
    theirs.chmod(mode)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(theirs))
    monkeypatch.setenv("TMPDIR", str(temporary))
    pretend_to_own(monkeypatch, theirs, os.geteuid() + 1)
    caplog.set_level(logging.INFO, "sharedpool.worker")
    assert [addresses.runtime_dir(), addresses.runtime_dir()] == [
        temporary / f"sharedpool-{os.geteuid()}"
    ] * 2
    assert list(theirs.iterdir()) == []
    assert caplog.messages == [
        f"XDG_RUNTIME_DIR is not used: {theirs} belongs to uid {os.geteuid() + 1}"
    ]


def test_a_directory_that_another_user_has_left_in_ours_is_not_used(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
) -> None:
    (runtime_dir / "sharedpool").mkdir(mode=0o700)
    (runtime_dir / "temporary").mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(runtime_dir / "temporary"))
    pretend_to_own(monkeypatch, runtime_dir / "sharedpool", os.geteuid() + 1)
    assert addresses.runtime_dir() == runtime_dir / "temporary" / f"sharedpool-{os.geteuid()}"


def test_another_users_private_temporary_directory_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("TMPDIR", str(runtime_dir))
    pretend_to_own(monkeypatch, runtime_dir, os.geteuid() + 1)
    assert addresses.runtime_dir() == Path("/tmp", f"sharedpool-{os.geteuid()}")
    assert list(runtime_dir.iterdir()) == []


def test_the_temporary_directory_is_the_same_when_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
) -> None:
    """As on a full disk: who comes then must meet those who came before, and not look in its
    current directory."""
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("TMPDIR", str(runtime_dir))
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
from sharedpool.discovery import address
print(address.runtime_dir())
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(found) == addresses.runtime_dir()
    assert Path(found).parent == runtime_dir


def pretend_to_own(monkeypatch: pytest.MonkeyPatch, path: Path, uid: int) -> None:
    """Have `path` belong to `uid`: really, if we may; else for those who ask for its status."""
    if os.geteuid() == 0:
        os.chown(path, uid, -1)
        return
    real_stat, real_lstat = os.stat, os.lstat

    def asking(real: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def ask(asked: Any, *more: Any, **options: Any) -> os.stat_result:
            found = real(asked, *more, **options)
            if not isinstance(asked, int) and Path(os.fsdecode(asked)) == path:
                return os.stat_result([*found[:4], uid, *found[5:10]])
            return found

        return ask

    monkeypatch.setattr("os.stat", asking(real_stat))
    monkeypatch.setattr("os.lstat", asking(real_lstat))


def test_a_symlink_is_refused(runtime_dir: Path) -> None:
    (runtime_dir / "elsewhere").mkdir(mode=0o700)
    (runtime_dir / "sharedpool").symlink_to(runtime_dir / "elsewhere")
    pool = sharedpool.config_pool(
        dsn=DSN
    )  # whoever uses it may be somebody else, and have another directory
    with pytest.raises(ConfigError, match="symlink"):
        pool.get_conn()


def test_a_directory_open_to_others_is_refused(runtime_dir: Path) -> None:
    (runtime_dir / "sharedpool").mkdir()
    (runtime_dir / "sharedpool").chmod(0o755)
    pool = sharedpool.config_pool(
        dsn=DSN
    )  # whoever uses it may be somebody else, and have another directory
    with pytest.raises(ConfigError, match="chmod 700"):
        pool.get_conn()


def test_somebody_elses_directory_is_refused(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("TMPDIR", str(runtime_dir))
    theirs = runtime_dir / f"sharedpool-{os.geteuid()}"
    theirs.mkdir(mode=0o700)
    pretend_to_own(monkeypatch, theirs, os.geteuid() + 1)
    pool = sharedpool.config_pool(
        dsn=DSN
    )  # whoever uses it may be somebody else, and have another directory
    with pytest.raises(ConfigError, match="belongs to uid"):
        pool.get_conn()


def test_a_tcp_brokers_files_do_not_move_with_the_environment(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
) -> None:
    """Else one restarted from another shell would know of no lease."""
    places = set()
    for base in (runtime_dir / "a", runtime_dir / "b", None):
        if base is None:
            monkeypatch.delenv("XDG_RUNTIME_DIR")
            monkeypatch.setenv("TMPDIR", str(runtime_dir))
        else:
            base.mkdir(mode=0o700)
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
        places.add(
            (addresses.lock_path("tcp://[::1]:5555"), addresses.journal_path("tcp://[::1]:5555"))
        )
    ((lock, journal),) = places
    assert lock.parent == journal.parent
    assert lock.parent.stat().st_mode & 0o777 == 0o700


def test_two_brokers_that_know_nothing_of_each_other_have_other_epochs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The later one's is the higher, though its predecessor's lock file was deleted within the same
    second."""
    epochs = []
    for now in (1_700_000_000.001, 1_700_000_000.002):
        monkeypatch.setattr("time.time", lambda now=now: now)
        lock = BrokerLock(tmp_path / "lock")
        epochs.append(lock.epoch)
        lock.release(for_good=True)
    assert epochs[0] < epochs[1]


@pytest.mark.parametrize(
    "address",
    [
        "tcp://*:5555",
        "tcp://0.0.0.0:5555",
        "tcp://db.example:5555",
        "tcp://host",
        "tcp://host:0",
        "tcp://host:99999",
        "udp://x:1",
        "ipc://",
        "inproc://x",
        "",
    ],
)
def test_addresses_no_broker_can_have(address: str) -> None:
    with pytest.raises(ConfigError, match="here"):
        addresses.check_address(address, "here")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "[::1]", "localhost"])
def test_a_tcp_broker_is_for_its_own_host(host: str) -> None:
    address = f"tcp://{host}:5555"
    assert addresses.check_address(address, "here") == address


def test_the_automatic_broker_is_one_for_all_pools_of_a_server_and_role() -> None:
    def address(**settings: Any) -> str:
        return sharedpool.config_pool(**settings)._broker.address()

    same = {
        address(dsn=DSN),
        address(db_url="postgres://app:other@db.example:5432/app"),
        address(dsn=DSN, max_conn=9),
        address(dsn=DSN, name="reports"),
        address(dsn=DSN, dbname="other"),
    }
    assert len(same) == 1
    others = {
        address(dsn=DSN, port=5433),
        address(dsn=DSN, user="other"),
        address(dsn=DSN, host="other.example"),
    }
    assert len(others | same) == 4


def test_where_the_automatic_broker_is_depends_on_who_uses_it(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
) -> None:
    """Not on who configured the pool: programs are started as root, and work as somebody else."""
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("TMPDIR", str(runtime_dir / "roots"))
    pool = sharedpool.config_pool(dsn=DSN)  # in a folder that is not even there
    monkeypatch.setenv("TMPDIR", str(runtime_dir))
    assert pool._broker.address().startswith(f"ipc://{runtime_dir}/sharedpool-")
