"""PID 1 of a host of the laboratory: `python host_init.py SETTINGS`, in namespaces of its own.

It gives the host a name and private folders, starts the programs it is sent, and reaps whatever
ends, as the init of a real machine does. It imports nothing but the standard library. Its standard
input is a SEQPACKET socket to the test:

- in: {"run": [program, …]}, with three descriptors: the program's stdin, stdout and stderr
- out: {"ready": true}, {"started": pid}, {"error": text},
  {"ended": pid, "status": exit code, or minus the signal}

When the test ends, for whatever reason, so does that socket; then PID 1 ends, and the kernel kills
the whole host.
"""

import array
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

MOST = 1 << 16
_started: dict[int, subprocess.Popen[bytes]] = {}


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def furnish(name: str, root: Path, boot: str, private: list[str], kept: list[str]) -> None:
    """Give this host its name, boot id and `private` folders.

    In these it sees those of the machine that are `kept`. Nothing of that is seen outside: the
    mount namespace is private.
    """
    socket.sethostname(name)
    # Two machines have different boot ids. The file stays open to all, as the kernel's own is.
    (root / "boot_id").write_text(f"{boot}\n")
    mount("--bind", str(root / "boot_id"), "/proc/sys/kernel/random/boot_id")
    new = root / "new"
    new.mkdir()
    for place in private:
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(new))
        for folder in kept:
            if Path(place) in Path(folder).parents:
                target = new / Path(folder).relative_to(place)
                target.mkdir(parents=True, exist_ok=True)
                mount("--rbind", folder, str(target))
        mount("--rbind", str(new), place)
    Path(os.environ["XDG_RUNTIME_DIR"]).mkdir(mode=0o700, parents=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def start(message: dict[str, object], descriptors: list[int]) -> dict[str, object]:
    """Start a program; return the answer."""
    command = message["run"]
    assert isinstance(command, list)
    try:
        process = subprocess.Popen(
            command,
            stdin=descriptors[0],
            stdout=descriptors[1],
            stderr=descriptors[2],
            start_new_session=True,
        )
    except OSError as error:
        return {"error": f"{command[0]}: {error}"}
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    _started[process.pid] = process
    return {"started": process.pid}


def reap(control: socket.socket) -> None:
    """Reap everything that has ended, and tell of what we have started ourselves.

    Orphans of other programs are reaped, too.
    """
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = found
            if (process := _started.pop(pid, None)) is not None:
                process.returncode = os.waitstatus_to_exitcode(status)  # it is reaped: by us
                control.send(json.dumps({"ended": pid, "status": process.returncode}).encode())


def receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one message and its descriptors; only the program they are for may inherit them."""
    descriptors = array.array("i")
    data, ancillary, _, _ = control.recvmsg(MOST, socket.CMSG_SPACE(3 * descriptors.itemsize))
    for level, kind, content in ancillary:
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        descriptors.frombytes(content)
    return data, list(descriptors)


def main() -> None:
    settings = json.loads(sys.argv[1])
    control = socket.socket(fileno=os.dup(0))
    control.set_inheritable(False)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    alarm, ringer = os.pipe()
    for descriptor in (alarm, ringer):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(ringer, warn_on_full_buffer=False)
    root = Path(settings.pop("root"))
    furnish(root=root, **settings)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # from here on: `mount` was waited for
    control.send(b'{"ready": true}')
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(alarm, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if alarm in ready:
            os.read(alarm, MOST)
            reap(control)
        if control.fileno() in ready:
            data, descriptors = receive(control)
            if not data:
                return
            control.send(json.dumps(start(json.loads(data), descriptors)).encode())


if __name__ == "__main__":
    assert os.getpid() == 1, "this is for PID 1 of a namespace"
    main()
