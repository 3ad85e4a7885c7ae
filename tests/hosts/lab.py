"""The laboratory: several hosts and PostgreSQL on one machine, and a network of their own.

`with Laboratory() as lab:` makes it, and the end of the block removes what was made. If the process
is killed instead, everything ends with it, and one directory in /tmp is left.
"""

import os
import shutil
import subprocess
import tempfile
from itertools import count
from pathlib import Path
from typing import Self

from tests.hosts.host import Host
from tests.hosts.network import PREFIX, Switch
from tests.hosts.server import LabServer, Standby

_PROGRAMS = ("ip", "nsenter", "setpriv", "unshare", "mount", "cp", "sh", "cat")
_NEEDED = ("--pid", "--fork", "--mount", "--uts", "--ipc", "--net", "--mount-proc")
# A bridge, and a cable whose ends are named as ours: some kernels are built without them, and some
# containers may not make them.
_TRIAL = (
    "ip link add bridge type bridge && ip link add port1 type veth peer name eth0"
    " && mount -t tmpfs tmpfs /tmp"
)


def missing() -> str:
    """Return what this machine lacks for the laboratory, in one line; nothing if it has all."""
    if lacking := [program for program in _PROGRAMS if shutil.which(program) is None]:
        return f"several hosts on one machine need {' and '.join(lacking)} (iproute2, util-linux)"
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        return "several hosts on one machine need Linux, with /proc/PID/task/TID/children"
    if os.geteuid() != 0:
        return "several hosts on one machine need root"
    tried = subprocess.run(
        ["unshare", *_NEEDED, "sh", "-c", _TRIAL],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if tried.returncode:
        return f"several hosts on one machine need namespaces: {tried.stderr.strip()}"
    return ""


class Laboratory:
    """A network, a server on it, and as many hosts as are added."""

    def __init__(self) -> None:
        # Short enough for unix sockets; the hosts see it under the same path.
        self.directory = Path(tempfile.mkdtemp(prefix="spl-", dir="/tmp"))
        self.hosts: dict[str, Host] = {}
        self._addresses = count(11)
        self._servers: list[LabServer] = []
        self._switch: Switch | None = None
        try:
            self._switch = Switch()
            self.server = self._add(LabServer(f"{PREFIX}1", self._switch))
        except BaseException:
            self.close()
            raise

    def _add(self, server: LabServer) -> LabServer:
        self._servers.append(server)  # at once: a start that fails leaves something behind
        server.start()
        return server

    @property
    def switch(self) -> Switch:
        assert self._switch is not None
        return self._switch

    def add_host(self, name: str) -> Host:
        """Have a new host join; its name may be one that is gone."""
        old = self.hosts.get(name)
        assert old is None or not old.is_up, f"there is a host {name}"
        if old is not None:
            old.close()
        host = Host(name, f"{PREFIX}{next(self._addresses)}", self.switch, self.directory)
        self.hosts[name] = host
        return host

    def add_standby(self) -> Standby:
        """Have a streaming replica of the server on another machine."""
        standby = Standby(self.server, f"{PREFIX}2", self.switch)
        self._add(standby)
        standby.wait_until_it_streams()
        return standby

    def close(self) -> None:
        """End and remove all that was made, and nothing else."""
        try:
            for host in self.hosts.values():
                host.close()
            # The replica first: the primary would wait for it to have everything.
            for server in reversed(self._servers):
                server.stop()
        finally:
            if self._switch is not None:
                self._switch.close()
            shutil.rmtree(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
