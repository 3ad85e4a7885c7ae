"""The network of the laboratory: a bridge in a namespace of its own, and a veth to every machine.

Nothing of the machine's own network is touched: the bridge, both ends of every cable (veth) and all
addresses are in namespaces that vanish with the processes in them. So do routes and neighbours;
there is nothing to tidy up.
"""

import subprocess
from itertools import count
from typing import Self

PREFIX = "10.77.0."
NETMASK = 24


class NetworkFailed(RuntimeError):
    """`ip` has refused something."""


def run_in(pid: int, *command: str) -> str:
    """Run a command in the network namespace of a process; return what it printed."""
    prefix = ("nsenter", f"--net=/proc/{pid}/ns/net")
    done = subprocess.run(
        [*prefix, *command], capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode:
        raise NetworkFailed(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class NetworkNamespace:
    """A network namespace, and nothing else; it lives as long as this object's process."""

    def __init__(self) -> None:
        # `cat` ends when our end of the pipe does, also when we are killed.
        script = "ip link set lo up && echo ready && exec cat"
        self._process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            self.close()
            raise NetworkFailed("no network namespace could be made")

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._process.communicate(timeout=30)


class Switch:
    """The bridge that all machines are connected to."""

    def __init__(self) -> None:
        self._namespace = NetworkNamespace()
        self._ports = count(1)
        try:
            self._ip("link", "add", "bridge", "type", "bridge")
            self._ip("link", "set", "bridge", "up")
        except BaseException:
            self._namespace.close()
            raise

    @property
    def pid(self) -> int:
        """The process that the bridge's namespace lives by."""
        return self._namespace.pid

    def _ip(self, *words: str) -> str:
        return run_in(self._namespace.pid, "ip", *words)

    def connect(self, pid: int, address: str) -> "Cable":
        """Lay a cable to the network namespace of a process, which gets this address."""
        port = f"port{next(self._ports)}"
        ours = ("name", port, "type", "veth")
        self._ip("link", "add", *ours, "peer", "name", "eth0", "netns", str(pid))
        run_in(pid, "ip", "address", "add", f"{address}/{NETMASK}", "dev", "eth0")
        run_in(pid, "ip", "link", "set", "eth0", "up")
        self._ip("link", "set", port, "master", "bridge")
        self._ip("link", "set", port, "up")
        return Cable(self, port)

    def set_port(self, port: str, state: str) -> None:
        self._ip("link", "set", port, state)

    def close(self) -> None:
        self._namespace.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Cable:
    """A machine's cable.

    Cut, it swallows what is sent: neither side is told, and no connection is reset.
    """

    def __init__(self, switch: Switch, port: str) -> None:
        self._switch = switch
        self._port = port

    def cut(self) -> None:
        self._switch.set_port(self._port, "down")

    def heal(self) -> None:
        self._switch.set_port(self._port, "up")
