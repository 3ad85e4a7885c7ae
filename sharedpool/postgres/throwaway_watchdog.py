"""The watchdog of a throw-away server, run as a script: it cleans up when its parent cannot.

It starts before the server's directory exists and holds one end of a pipe. When the pipe closes for
any reason (`stop()`, Ctrl-C, SIGKILL), it ends the server and removes the directory. So there is
one way to clean up.

It starts quickly, since it runs without site-packages: it can import neither those nor the package.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

PROGRAMS = ("initdb", "postgres")
STOP_S = 10.0
POLL_S = 0.005


def _watch(directory: Path, parent: int) -> None:
    """Wait until the parent writes or dies, then sweep: the watchdog's whole work."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The watchdog ends soon after the server, and earlier would leave files behind.
        signal.signal(signum, signal.SIG_IGN)
    pipe = select.poll()
    pipe.register(0, select.POLLIN)
    while not pipe.poll(250) and os.getppid() == parent:
        pass  # a pipe that the parent's forked children hold does not close: look at the parent
    sweep(directory)


def sweep(directory: Path) -> None:
    """Kill the directory's server processes; remove their shared memory and the directory."""
    end_processes(directory)
    with contextlib.suppress(OSError, IndexError, ValueError):  # a clean exit has removed the file
        words = (directory / "data" / "postmaster.pid").read_text().splitlines()[6].split()
        # The line holds key and id of the SysV segment. 0 is IPC_RMID.
        ctypes.CDLL(None).shmctl(int(words[1]), 0, None)
    shutil.rmtree(directory, ignore_errors=True)


def end_processes(directory: Path) -> None:
    """Kill the server processes of the directory and wait for their end.

    SIGKILL is needed: after a milder signal initdb would remove the file that `sweep` reads, while
    a child of initdb still has the shared memory.
    """
    deadline = time.monotonic() + STOP_S
    while (processes := _processes_in(directory)) and time.monotonic() < deadline:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(POLL_S)


def _processes_in(directory: Path) -> list[int]:
    """Return the directory's server processes.

    Without /proc return none: then they exit by themselves within a minute.
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            inside = directory in (work := Path(os.readlink(process / "cwd")), *work.parents)
            if inside and (process / "comm").read_text().strip() in (*PROGRAMS, "sh"):
                found.append(int(process.name))
    return found


if __name__ == "__main__":
    _watch(Path(sys.argv[1]), int(sys.argv[2]))
