"""Why a connect failed, found out without reading the error's text.

The text is of no use for decisions: servers and libpq speak many languages. libpq tells how far the
connect came: no server answered, or one refused. It does not tell the SQLSTATE of a refusal. So the
connect is made once more with a libpq that is told to write the SQLSTATE and nothing else. It takes
place in the slot of the failed connect, after that one's backend was seen to end. A repeated
failure of the same kind is not asked about every time.
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
# A SQLSTATE is taken to be the same for this long, if libpq came as far as the last time.
_KNOWN_S = 30.0
# libpq up to 16 counts whole seconds: a limit of 2 s may pass after a little more than 1 s.
_ROUNDING_S = 1.1
# Classes of SQLSTATEs that describe the server. One connect may meet several codes, over another
# address or without TLS: these go before others.
_OF_THE_SERVER = ("53", "57", "58")


class Failure(NamedTuple):
    """A failed connect."""

    # The backend is known to have ended, or there never was one.
    gone: bool
    # The error's text, for the caller.
    error: str = ""
    # The server's SQLSTATE, if there is one.
    code: str = ""
    # No server has answered.
    unreachable: bool = False
    # The other side has closed the connection, but it may have been a proxy.
    peer_closed: bool = False


class Diagnosis:
    """What a process has found out about its failed connects."""

    def __init__(self) -> None:
        self._asked_password = False
        self._code = ""
        self._known_until = float("-inf")

    def of(
        self, conn: PooledConnection, error: BaseException, deadline: float | None, known: str = ""
    ) -> Failure:
        """Return what is known of a failed connect.

        May connect again, for a second at most and not past `deadline`. `known` is the SQLSTATE
        with which the server refuses every connect at present, if the broker knows of one: it is
        taken for the reason.
        """
        text = one_line(error) if isinstance(error, psycopg2.Error) else ""
        fd, tried = libpq.socket_of_failed(conn), libpq.tried(conn)
        if fd is None or tried is None:
            return Failure(False, text)
        if fd < 0:
            # Case 1: not connected. Whether there was ever a backend is only unknown if libpq gave
            # up waiting or has tried several hosts.
            late = timed_out(conn)
            several = "," in extensions.parse_dsn(conn.dsn).get("host", "")
            return Failure(not late and not several, text, "", late or nobody_at(tried))
        if isinstance(error, greenlets.ConnectTimeout):
            # Case 2: connected to a silent server, and the caller's time is over.
            end_session(conn, fd, limit_s=0)
            return Failure(False, text, unreachable=True)
        # Case 3: the server has refused, and its backend exits. Its end is seen on libpq's own
        # socket, which is open as long as `conn` lives, since there may be no descriptor for a
        # duplicate.
        conn.sharedpool_direct = conn.sharedpool_direct or is_to_postmaster(fd) or None
        end_session(conn, fd)
        code, reached = "", True
        if text and conn.sharedpool_gone:  # else there is no free slot for another connect
            code, reached = (known, True) if known else self._code_of(conn, tried, deadline)
        return Failure(
            conn.sharedpool_gone, text, code, not reached, peer_closed=conn.sharedpool_peer_closed
        )

    def _code_of(
        self, conn: PooledConnection, tried: libpq.Tried, deadline: float | None
    ) -> tuple[str, bool]:
        """Return the SQLSTATE of a refusal, and False if no server answers any more."""
        now = time.monotonic()
        if now < self._known_until and tried.asked_password == self._asked_password:
            return self._code, True
        limit_s = _LIMIT_S if deadline is None else min(_LIMIT_S, deadline - now)
        self._code, reached = _ask(conn, tried, limit_s) if limit_s > 0 else ("", True)
        if reached:
            self._asked_password = tried.asked_password
            # The server's state may change at any moment, so those codes are not kept.
            keep = self._code and not self._code.startswith(_OF_THE_SERVER)
            self._known_until = now + _KNOWN_S if keep else now
        return self._code if reached else "", reached


def one_line(error: BaseException) -> str:
    """Return an error's text as one line, for display."""
    return " ".join(str(error).split())[:500]


def timed_out(conn: PooledConnection) -> bool:
    """Return True if a connect may have failed because its time limit was reached."""
    took_s, limit_s = time.monotonic() - conn.sharedpool_started, conn.sharedpool_timeout_s
    return limit_s is not None and limit_s > 0 and took_s >= max(limit_s, 2.0) - _ROUNDING_S


def nobody_at(tried: libpq.Tried) -> bool:
    """Return True if no server answers at the address that libpq tried.

    libpq may also have failed before it tried any address, over an invalid option.
    """
    if tried.hostaddr:
        return True
    if not tried.host.startswith(("/", "@")):
        return False  # it found no address, or needed none
    path = f"{tried.host}/.s.PGSQL.{tried.port}"
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect("\0" + path[1:] if path.startswith("@") else path)
        except BlockingIOError:
            return False  # a server is there, but busy
        except OSError:
            return True
    return False


def _ask(conn: PooledConnection, tried: libpq.Tried, limit_s: float) -> tuple[str, bool]:
    """Connect again, to be refused with a SQLSTATE; set `conn.sharedpool_gone` for the new backend.

    Return the SQLSTATE or "", and False if no server answers any more.
    """
    lib, pointer = libpq.library(), conn.pgconn_ptr
    if lib is None or not pointer or extensions.libpq_version() < 120000:
        return "", True
    if (options := libpq.options(lib, pointer)) is None:
        return "", True
    for name in ("service", "hostaddr", "target_session_attrs"):  # connect to this very server
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
            conn.sharedpool_gone = conn.sharedpool_peer_closed = False
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
