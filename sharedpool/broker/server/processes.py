"""Who sends, and whether that process lives: the kernel's word, not the worker's.

Every worker on this host is watched by a pidfd, which becomes readable the moment the process ends.
"""

from __future__ import annotations

import functools
import logging
import os
import resource
import selectors
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import zmq

from sharedpool.broker.core.commands import Process
from sharedpool.discovery.pid_namespace import pid_namespace_id

logger = logging.getLogger("sharedpool.broker")


class Peer(NamedTuple):
    """Who sent a frame: uid and pid as the kernel vouches for them (ipc on Linux), or how it came (tcp)."""

    uid: int | None = None
    pid: int | None = None
    loopback: bool = False


def peer_of(frame: zmq.Frame, *, ipc: bool) -> Peer:
    """Return who sent a frame."""
    try:
        address = str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return Peer()
    if not ipc:
        return Peer(loopback=address.removeprefix("::ffff:").startswith("127.") or address == "::1")
    fields = address.rsplit(":", 3)
    return Peer(int(fields[1]), int(fields[3])) if len(fields) == 4 else Peer()


def process(pid: int) -> Process:
    """Return the process that has this pid now."""
    return Process(pid, _started(pid), _here())


_here = functools.cache(pid_namespace_id)


def _started(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 where there is no telling."""
    try:
        # The name, in parentheses, may hold anything; the 22nd field of proc(5) is the 20th after it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def called(pid: int | None) -> str:
    """Return what the process with this pid is called, as an addition to a text; "" if it is not to be seen."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().rstrip("\n") if pid else ""
    except (OSError, UnicodeDecodeError):
        return ""
    return f" ({name if name.isprintable() else ascii(name)}[{pid}])" if name else ""


@dataclass(slots=True)
class WatchedProcess:
    """A process under watch: its pidfd, and the sessions that it has registered."""

    process: Process
    fd: int
    sessions: set[bytes] = field(default_factory=set)


class WatchedProcesses:
    """The processes under watch, in a selector: a `WatchedProcess` is the key's data."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._processes: dict[Process, WatchedProcess] = {}
        self._by_session: dict[bytes, WatchedProcess] = {}

    def watch(self, session: bytes, process: Process | None) -> bool:
        """Watch a session's process; return False when it has ended already."""
        if process is None or not hasattr(os, "pidfd_open"):
            return True  # another host or platform: heartbeats alone tell
        if process.pid_namespace and process.pid_namespace != _here():
            return True  # known from a broker to which that pid meant another process
        self.forget(session)
        watched = self._processes.get(process)
        if watched is None:
            try:
                watched = self._open(process)
            except ProcessLookupError:
                return False
            except OSError as error:
                text = "cannot watch process %d (%s): only its silence will tell of its death"
                logger.warning(text, process.pid, error)
                return True
        watched.sessions.add(session)
        self._by_session[session] = watched
        return True

    def _open(self, process: Process) -> WatchedProcess:
        """Begin to watch a process. Raise `OSError`; `ProcessLookupError` when it has ended."""
        fd = os.pidfd_open(process.pid)
        if process.started and _started(process.pid) != process.started:
            os.close(fd)
            raise ProcessLookupError(f"process {process.pid} is another by now")
        watched = WatchedProcess(process, fd)
        self._selector.register(fd, selectors.EVENT_READ, watched)
        if (
            process.started
        ):  # else its pid may be used again, and it cannot be told from the next one
            self._processes[process] = watched
        return watched

    def forget(self, session: bytes) -> None:
        """Stop watching for a session; its process is watched as long as another session needs it."""
        watched = self._by_session.pop(session, None)
        if watched is None:
            return
        watched.sessions.discard(session)
        if not watched.sessions:
            self._processes.pop(watched.process, None)
            self._selector.unregister(watched.fd)
            os.close(watched.fd)

    def close(self) -> None:
        """Stop watching everything."""
        for session in list(self._by_session):
            self.forget(session)


def raise_descriptor_limit() -> None:
    """Allow as many descriptors as we may have: every worker costs some, and libzmq aborts when there are none left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 65536)
    if soft != wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            logger.warning("only %d descriptors, for about %d workers: %s", soft, soft // 4, error)
