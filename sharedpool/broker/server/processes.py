"""Which process sends a message, and whether it lives: as the kernel says, not as the worker does.

Every worker on this host is watched by a pidfd, which becomes readable when the process ends.
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
    """The sender of a frame: uid and pid from the kernel (ipc on Linux), or how it came (tcp)."""

    uid: int | None = None
    pid: int | None = None
    loopback: bool = False


def peer_of(frame: zmq.Frame, *, ipc: bool) -> Peer:
    """Return the sender of a frame."""
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
    """Return when a process started, in clock ticks since boot; 0 if that cannot be known."""
    try:
        # The start time is field 22 of proc(5), the 20th after the name. The name is in parentheses
        # and may contain spaces and parentheses itself.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def called(pid: int | None) -> str:
    """Return a process's name and pid for the end of a log text; "" if the name cannot be read."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().rstrip("\n") if pid else ""
    except (OSError, UnicodeDecodeError):
        return ""
    return f" ({name if name.isprintable() else ascii(name)}[{pid}])" if name else ""


@dataclass(slots=True)
class WatchedProcess:
    """A watched process: its pidfd, and the sessions that it has registered."""

    process: Process
    fd: int
    sessions: set[bytes] = field(default_factory=set)


class WatchedProcesses:
    """The watched processes, in a selector: each is the data of its key."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._processes: dict[Process, WatchedProcess] = {}
        self._by_session: dict[bytes, WatchedProcess] = {}

    def watch(self, session: bytes, process: Process | None) -> bool:
        """Watch a session's process; return False if it has ended already."""
        if process is None or not hasattr(os, "pidfd_open"):
            return True  # another host or platform: only its silence tells of its end
        if process.pid_namespace and process.pid_namespace != _here():
            return True  # restored from the journal of a broker in another PID namespace
        self.forget(session)
        watched = self._processes.get(process)
        if watched is None:
            try:
                watched = self._open(process)
            except ProcessLookupError:
                return False
            except OSError as error:
                text = "cannot watch process %d (%s): its death will be noticed only by its silence"
                logger.warning(text, process.pid, error)
                return True
        watched.sessions.add(session)
        self._by_session[session] = watched
        return True

    def _open(self, process: Process) -> WatchedProcess:
        """Begin to watch a process. Raise OSError, `ProcessLookupError` if it has ended."""
        fd = os.pidfd_open(process.pid)
        if process.started and _started(process.pid) != process.started:
            os.close(fd)
            raise ProcessLookupError(f"pid {process.pid} is another process by now")
        watched = WatchedProcess(process, fd)
        self._selector.register(fd, selectors.EVENT_READ, watched)
        # Without a start time a later process with this pid could not be told from it: not shared.
        if process.started:
            self._processes[process] = watched
        return watched

    def forget(self, session: bytes) -> None:
        """Stop watching for a session. Its process is watched as long as it has another session."""
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
    """Raise the soft limit of descriptors: every worker needs some, and libzmq aborts without."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 65536)
    if soft != wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            logger.warning(
                "only %d descriptors, enough for about %d workers: %s", soft, soft // 4, error
            )
