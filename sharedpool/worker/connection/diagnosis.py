"""Why a connect failed, learnt without reading a word of the error: servers and libpq speak many languages.

libpq tells how far it came: nobody there, or somebody who refused. What the server has refused with, the SQLSTATE, it
keeps to itself; so the connect is made once more, in the slot of the one that failed and after that one's end was seen,
with a libpq that is told to write the code and nothing else. Who keeps failing in the same way is not asked every time.
"""

from __future__ import annotations

import os
import socket
import time
from typing import NamedTuple

import psycopg2
from psycopg2 import extensions

from sharedpool.postgres import libpq
from sharedpool.postgres.route import is_to_postmaster
from sharedpool.worker import greenlets
from sharedpool.worker.connection.closing import end_session
from sharedpool.worker.connection.pooled import PooledConnection

# A server that refuses does so at once.
_LIMIT_S = 1.0
# A refusal is the same for so long, if libpq came as far as then.
_KNOWN_S = 30.0
# libpq up to 16 counts whole seconds: a limit of 2 may pass after a little more than 1.
_ROUNDING_S = 1.1
# Codes of which one goes before others that the same connect has met, over another address or without TLS.
_OF_THE_SERVER = ("53", "57", "58")


class Failure(NamedTuple):
    """A connect that failed. `gone`: its backend is known to be gone, or never was.

    `closed`: somebody's end of it was seen, which may be a proxy's. `error` is the text that its caller gets, `code`
    the server's SQLSTATE, if there is one; `unreachable`: no server has answered.
    """

    gone: bool
    error: str = ""
    code: str = ""
    unreachable: bool = False
    closed: bool = False


class Diagnosis:
    """What one process has learnt of its failed connects."""

    def __init__(self) -> None:
        self._asked_password = False
        self._code = ""
        self._known_until = float("-inf")

    def of(
        self, conn: PooledConnection, error: BaseException, deadline: float | None, known: str = ""
    ) -> Failure:
        """Say what is known of a connect that failed; may connect again, for a second at most, not past `deadline`.

        `known`: the SQLSTATE with which the server refuses everybody, if it does; then that is taken for the reason.
        """
        text = one_line(error) if isinstance(error, psycopg2.Error) else ""
        fd, tried = libpq.socket_of_failed(conn), libpq.tried(conn)
        if fd is None or tried is None:
            return Failure(False, text)
        if fd < 0:
            # Never connected, unless libpq gave up waiting, or has tried several hosts.
            late = timed_out(conn)
            several = "," in extensions.parse_dsn(conn.dsn).get("host", "")
            return Failure(not late and not several, text, "", late or nobody_at(tried))
        if isinstance(error, greenlets.ConnectTimeout):
            end_session(conn, fd, limit_s=0)  # it is silent, and the caller's time is over
            return Failure(False, text, unreachable=True)
        # The server has refused, and leaves. libpq's own socket is open as long as `conn` lives; a duplicate might not
        # be had.
        conn.sharedpool_direct = conn.sharedpool_direct or is_to_postmaster(fd) or None
        end_session(conn, fd)
        if not text or not conn.sharedpool_gone:  # one more connect might be one too many
            return Failure(conn.sharedpool_gone, text, closed=conn.sharedpool_closed)
        if known:
            return Failure(conn.sharedpool_gone, text, known, closed=conn.sharedpool_closed)
        now = time.monotonic()
        if now >= self._known_until or tried.asked_password != self._asked_password:
            limit_s = _LIMIT_S if deadline is None else min(_LIMIT_S, deadline - now)
            self._code, reached = _ask(conn, tried, limit_s) if limit_s > 0 else ("", True)
            if not reached:
                return Failure(
                    conn.sharedpool_gone, text, unreachable=True, closed=conn.sharedpool_closed
                )
            self._asked_password = tried.asked_password
            # How a server is may change at any moment.
            lasts = self._code and not self._code.startswith(_OF_THE_SERVER)
            self._known_until = now + _KNOWN_S if lasts else now
        return Failure(conn.sharedpool_gone, text, self._code, closed=conn.sharedpool_closed)


def one_line(error: BaseException) -> str:
    """Return an error's text in a line, to be shown."""
    return " ".join(str(error).split())[:500]


def timed_out(conn: PooledConnection) -> bool:
    """Say whether a connect may have failed since its time was over."""
    took_s, limit_s = time.monotonic() - conn.sharedpool_started, conn.sharedpool_timeout_s
    return limit_s is not None and limit_s > 0 and took_s >= max(limit_s, 2.0) - _ROUNDING_S


def nobody_at(tried: libpq.Tried) -> bool:
    """Say whether libpq has tried an address at which nobody answers; it may have refused an option by itself."""
    if tried.hostaddr:
        return True
    if not tried.host.startswith(("/", "@")):
        return False  # it found no address, or looked for none
    path = f"{tried.host}/.s.PGSQL.{tried.port}"
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect("\0" + path[1:] if path.startswith("@") else path)
        except BlockingIOError:
            return False  # busy, but there
        except OSError:
            return True
    return False


def _ask(conn: PooledConnection, tried: libpq.Tried, limit_s: float) -> tuple[str, bool]:
    """Connect again, to be refused with a code; `conn.sharedpool_gone` tells of this backend's end then.

    Return the code, if there is one, and False when nobody is there any more.
    """
    lib, pointer = libpq.library(), conn.pgconn_ptr
    if lib is None or not pointer or extensions.libpq_version() < 120000:
        return "", True
    if (options := libpq.options(lib, pointer)) is None:
        return "", True
    for name in ("service", "hostaddr", "target_session_attrs"):  # this very server
        options.pop(name, None)
    options |= {"host": tried.host, "port": tried.port}
    if tried.hostaddr:
        options["hostaddr"] = tried.hostaddr
    attempt = libpq.Attempt(lib, {name: value for name, value in options.items() if value})
    witness = -1
    try:
        deadline = time.monotonic() + limit_s
        while attempt.events and (left_s := deadline - time.monotonic()) > 0:
            poller = greenlets.poller()
            poller.register(attempt.fd, attempt.events)
            if greenlets.wait(poller, left_s):
                attempt.step()
        if attempt.fd >= 0:
            witness = os.dup(attempt.fd)
            conn.sharedpool_gone = conn.sharedpool_closed = False
    finally:
        codes, reached = attempt.codes(), attempt.fd >= 0 or not attempt.failed
        attempt.finish()
        if witness >= 0:
            try:
                end_session(conn, witness)
            finally:
                os.close(witness)
    code = next(
        (code for code in codes if code.startswith(_OF_THE_SERVER)), codes[0] if codes else ""
    )
    return code, bool(code) or reached
