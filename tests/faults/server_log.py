"""The server's own log as the oracle of the limit: how many backends of one role lived at the same
time.

Every backend appends its lines by itself, so their order in the file is the order of what happened.
It notes its "disconnection" after it has left the books of the server and before it closes its
socket.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

# For EphemeralPostgres(settings=...): milliseconds, process, user.
SETTINGS = {"log_connections": "on", "log_disconnections": "on", "log_line_prefix": "%n %p [%u] "}
_LINE = re.compile(
    r"(?P<at>\d+\.\d+) (?P<pid>\d+) \[(?P<user>[^\]]*)\] (?P<level>[A-Z]+):  (?P<text>.*)"
)
# A backend that was authorized, but did not come to note its disconnection.
_REFUSED = re.compile(
    r"too many|remaining connection slots|is starting up|is shutting down|recovery mode|not "
    r"accepting"
)


@dataclass(slots=True)
class Depth:
    """A role's backends by the log; times are the server's, since the epoch.

    `refused`: when connects were refused.
    """

    peak: int = 0
    backends: int = 0
    alive: set[int] = field(default_factory=set)
    refused: list[float] = field(default_factory=list)
    ended: dict[int, list[float]] = field(
        default_factory=dict
    )  # pid -> when; a pid may be used again
    at_peak: str = ""

    def ended_at(self, pid: int, start: float) -> float | None:
        """Return when the backend ended that had this pid and start; None when the log does not
        say."""
        return next((at for at in self.ended.get(pid, []) if at >= start), None)


class ServerLog:
    """The log of one server, from where it stands when this is made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size

    def depth(self, role: str, application: str = "") -> Depth:
        """Follow the backends of `role` through the log.

        `application` is a pattern: only those whose application_name matches it are followed.
        """
        found = Depth()
        named = re.compile(f"application_name={application}" if application else "")
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read().decode("utf-8", "replace").splitlines()
        for line in lines:
            match = _LINE.match(line)
            if match is None:
                continue
            pid, text = int(match["pid"]), match["text"]
            if text.startswith("starting PostgreSQL"):
                # a postmaster starts only when nothing of its predecessor is left
                found.alive.clear()
            elif match["user"] != role:
                continue
            elif text.startswith("connection authorized:"):
                if not named.search(text):
                    continue
                found.alive.add(pid)
                found.backends += 1
                if len(found.alive) > found.peak:
                    found.peak, found.at_peak = len(found.alive), line
            elif text.startswith("disconnection:"):
                found.alive.discard(pid)  # does nothing if it is none of those
                found.ended.setdefault(pid, []).append(float(match["at"]))
            elif match["level"] == "FATAL" and _REFUSED.search(text):
                found.alive.discard(pid)
                found.refused.append(float(match["at"]))
        return found
