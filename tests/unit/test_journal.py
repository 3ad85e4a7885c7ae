"""What a broker that was killed leaves to its successor."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sharedpool.broker.core.commands import Entry, Member, Process, ServerIncarnation
from sharedpool.broker.server import journal as journals
from sharedpool.broker.server.journal import Journal
from sharedpool.wire.values import Backend, PoolSpec, Token


def entry(serial: int, backend: Backend | None = None) -> Entry:
    process = Process(77, 123456, "a boot, a namespace")
    spec = PoolSpec("päge", 5, 60_000)
    return Entry(Token(3, serial), b"w\xff\0", process, 77, "", "app.py", spec, 5, 60.0, backend)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.sock.journal"


def test_entries_recorded_and_not_erased_are_restored(path: Path) -> None:
    journal = Journal(path)
    assert not journal.intact
    assert journal.entries == []
    journal.mark_complete()
    for serial in (1, 2, 3):
        journal.record(entry(serial))
        journal.flush()
    journal.record(entry(2, Backend(9, 8, 7)))
    journal.flush()
    journal.erase(Token(3, 1))
    journal.flush()
    journal.erase(Token(3, 99))  # not known: nothing
    journal.flush()
    after = Journal(path)  # the first was never closed: it was killed
    assert after.intact
    assert after.entries == [entry(2, Backend(9, 8, 7)), entry(3)]


def test_a_lanes_members_are_restored_until_they_leave(path: Path) -> None:
    spec = PoolSpec("päge", 5, 60_000)
    stays, leaves = (Member(name, Process(77, 1, "here"), spec) for name in (b"w\xff\0", b"other"))
    journal = Journal(path)
    journal.mark_complete()
    journal.record(entry(1))
    for member in (stays, leaves, stays):
        journal.admit(member)
    journal.dismiss(leaves.session)
    journal.dismiss(b"nobody")
    journal.flush()
    after = Journal(path)
    assert (after.intact, after.entries, after.members) == (True, [entry(1)], [stays])
    assert Journal(path).members == [stays]  # that one has written it anew


def test_a_line_cut_short_is_one_that_never_counted(path: Path) -> None:
    journal = Journal(path)
    journal.mark_complete()
    journal.record(entry(1))
    journal.flush()
    journal.record(entry(2))
    journal.flush()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5)
    after = Journal(path)
    assert after.intact
    assert after.entries == [entry(1)]


def test_a_journal_not_marked_complete_is_not_complete_for_the_next_broker_either(
    path: Path,
) -> None:
    journal = Journal(path)
    journal.record(entry(1))
    journal.flush()
    after = Journal(path)  # killed before it knew all
    assert not after.intact
    assert after.entries == [entry(1)]
    after.mark_complete()
    assert Journal(path).intact


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense\n", b'{"version":99}\n', b'{"version":1}\n', b'{"version":2}\n{"lease":5}\n'],
)
def test_an_unreadable_journal_is_not_complete(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert not Journal(path).intact


def test_the_journal_does_not_grow_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "_COMPACT_BYTES", 5000)
    journal = Journal(path)
    journal.record(entry(0))
    journal.flush()
    for serial in range(1, 500):
        journal.record(entry(serial))
        journal.flush()
        journal.erase(Token(3, serial))
        journal.flush()
        assert path.stat().st_size < 10_000
    assert Journal(path).entries == [entry(0)]


def test_the_journal_is_the_users_alone_and_is_removed_for_good(path: Path) -> None:
    journal = Journal(path)
    assert path.stat().st_mode & 0o777 == 0o600
    journal.close(for_good=True)
    assert not path.exists()


def test_a_broker_that_cannot_write_leaves_nothing_to_believe(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(path)
    os.close(journal._fd)
    journal._fd = os.open("/dev/full", os.O_WRONLY)
    journal.record(entry(1))
    journal.flush()
    journal.record(entry(2))
    journal.flush()
    assert "the broker will grant nothing for a while" in caplog.text
    assert not path.exists()
    assert not Journal(path).intact


def test_the_newest_servers_that_were_seen_outlive_it_and_its_rewriting(path: Path) -> None:
    journal = Journal(path)
    for boot_us in range(60):
        journal.record_server(ServerIncarnation("::1:5432", boot_us))
        journal.record_server(ServerIncarnation("::1:5432", boot_us))
    journal.record_server(ServerIncarnation("::1:5432", 30))  # after a failover and back
    newest = [ServerIncarnation("::1:5432", boot_us) for boot_us in [28, 29, *range(31, 60), 30]]
    assert Journal(path).servers == newest
    assert Journal(path).servers == newest  # the one before has rewritten it
    assert path.read_bytes().count(b"server") == len(newest)


@contextmanager
def file_size_limit(most: int) -> Iterator[None]:
    """Files can grow no further than this: a write that would is cut short, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_journal_that_cannot_be_rewritten_whole_is_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path)
    journal.mark_complete()
    entries = [entry(serial) for serial in range(60)]
    for each in entries:
        journal.record(each)
    journal.flush()
    monkeypatch.setattr(journals, "_COMPACT_BYTES", 0)
    real_open = os.open

    def open_limited(*arguments: Any, **more: Any) -> int:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
        return real_open(*arguments, **more)

    with file_size_limit(path.stat().st_size * 2):
        monkeypatch.setattr(os, "open", open_limited)
        journal.erase(entries[0].token)
        journal.flush()
        monkeypatch.setattr(os, "open", real_open)
    assert not path.with_suffix(".new").exists()
    after = Journal(path)  # the first was never closed: it was killed
    assert after.intact
    assert after.entries == entries[1:]


def test_a_broker_that_cannot_begin_a_journal_does_not_start(path: Path) -> None:
    with file_size_limit(5), pytest.raises(OSError, match=r"too large|No space") as raised:
        Journal(path)
    assert raised.value.filename == str(path.with_suffix(".new"))
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_somebody_elses_file_is_not_believed(path: Path) -> None:
    Journal(path).close()
    os.chown(path, 65534, 65534)
    with pytest.raises(PermissionError, match="another user"):
        Journal(path)


def test_a_symlink_is_not_followed(path: Path, tmp_path: Path) -> None:
    Journal(path).close()
    other = path.rename(tmp_path / "elsewhere")
    path.symlink_to(other)
    with pytest.raises(OSError, match="symbolic link"):
        Journal(path)
