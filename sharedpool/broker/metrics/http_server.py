"""Serve the metrics and the status page by HTTP: read-only, beside the broker's loop.

One thread accepts connections and keeps the history; one more answers each connection. The loop
copies what they show, at its own time and at most ten times a second, however many clients ask. A
client that hangs costs a thread, until it has to make room for a newer one.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from importlib import resources
from typing import Any

from sharedpool.broker.core.snapshot import History, Snapshot
from sharedpool.broker.metrics import prometheus
from sharedpool.descriptors.readable import readable
from sharedpool.errors import SharedPoolError
from sharedpool.wire.codec import document
from sharedpool.wire.reports import LeaseLine, process_name

logger = logging.getLogger("sharedpool.broker")

_MOST_CLIENTS = 16
_CLIENT_LIMIT_S = 10.0  # a client may be silent for so long
_FRESH_S = 0.1  # a snapshot is used again for so long
_HISTORY_EVERY_S = 5.0
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class HttpServer:
    """The HTTP server: `/metrics`, `/status.json`, and the status page at `/`."""

    def __init__(self, host: str, port: int, take_snapshot: Callable[[float], Snapshot]) -> None:
        """Listen; raise `SharedPoolError` if that fails.

        `take_snapshot(limit_s)` returns a `Snapshot`, or raises `TimeoutError`.
        """
        self._take_snapshot = take_snapshot
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise SharedPoolError(
                f"cannot serve metrics at {host}:{port}: {error.strerror or error}"
            ) from error
        self._listener.setblocking(False)
        self.host, self.port = self._listener.getsockname()[:2]
        self.local = ipaddress.ip_address(self.host).is_loopback
        self._wake_in, self._wake_out = socket.socketpair()
        self._clients: dict[socket.socket, None] = {}  # the oldest first
        self._lock = threading.Lock()
        self._snapshot_lock = threading.Lock()
        self._latest: Snapshot | None = None
        self._latest_at = float("-inf")
        self._history = History()
        self._thread = threading.Thread(target=self._run, name="sharedpool-metrics", daemon=True)

    def start(self) -> None:
        """Begin to answer requests."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        logger.info("metrics at http://%s:%d/metrics, status page at /", host, self.port)
        if not self.local:
            text = "metrics on %s:%d are not password-protected; they include process names"
            logger.warning(text, host, self.port)
        self._thread.start()

    def stop(self) -> None:
        """Stop; wait for the thread, but not for clients."""
        self._wake_out.send(b"\0")
        if self._thread.ident is not None:
            self._thread.join()
        self._listener.close()
        with self._lock:
            for client in self._clients:
                _close(client)
        self._wake_in.close()
        self._wake_out.close()

    def snapshot(self) -> tuple[Snapshot, dict[str, Any]]:
        """Return a snapshot of the broker that is at most a moment old, and the history.

        Blocks until the loop has made it. Raise `TimeoutError` after a few seconds.
        """
        with self._snapshot_lock:
            now = time.monotonic()
            if self._latest is None or now - self._latest_at >= _FRESH_S:
                self._latest = self._take_snapshot(3.0)
                self._latest_at = now = time.monotonic()
            return self._latest, self._history.ages(now)

    def _run(self) -> None:
        history_at = time.monotonic()
        while True:
            timeout_s = max(0.0, history_at - time.monotonic())
            ready = readable([self._listener, self._wake_in], timeout_s)
            if self._wake_in in ready:
                return
            if self._listener in ready:
                self._accept()
            if time.monotonic() >= history_at:
                history_at = time.monotonic() + _HISTORY_EVERY_S
                self._remember()

    def _remember(self) -> None:
        try:
            seen, _ = self.snapshot()
        except TimeoutError:
            return  # the chart has a gap there
        with self._snapshot_lock:
            self._history.add(seen, self._latest_at)

    def _accept(self) -> None:
        try:
            client, address = self._listener.accept()
        except OSError as error:
            logger.debug("a connection for metrics was not accepted: %s", error)
            return
        client.setblocking(True)
        with self._lock:
            self._clients[client] = None
            if len(self._clients) > _MOST_CLIENTS:
                _close(oldest := next(iter(self._clients)))
                del self._clients[oldest]
        threading.Thread(
            target=self._serve, args=(client, address), name="sharedpool-http", daemon=True
        ).start()

    def _serve(self, client: socket.socket, address: Any) -> None:
        try:
            _Handler(client, address, self)  # type: ignore[arg-type]  # only `_Handler` uses it
            client.shutdown(socket.SHUT_WR)
            client.settimeout(1.0)
            # Unread input would make the close a reset, and the client could lose the answer.
            for _ in range(16):
                if not client.recv(4096):
                    break
        except OSError as error:
            logger.debug("a client of the metrics has disconnected: %s", error)
        finally:
            with self._lock:
                self._clients.pop(client, None)
            client.close()


class _Handler(BaseHTTPRequestHandler):
    """One request; HTTP/1.0, so that the connection ends with it."""

    server: HttpServer  # type: ignore[assignment]
    timeout = _CLIENT_LIMIT_S
    server_version, sys_version = "sharedpool", ""
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d %(message)s\n"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.server.local and not _names_this_host(self.headers.get("Host", "localhost")):
            # DNS rebinding: a page of another site, whose name resolves to this host, must not read
            # the names of processes.
            self.send_error(421, "only requests for localhost, or for this address, are served")
        elif path in _PAGE:
            name, kind = _PAGE[path]
            self._answer(
                kind,
                resources.files("sharedpool.broker.metrics").joinpath("page", name).read_bytes(),
            )
        elif path in ("/metrics", "/status.json"):
            self._show(path)
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _show(self, path: str) -> None:
        try:
            seen, history = self.server.snapshot()
        except TimeoutError:
            self.send_error(503, "the broker does not answer")
            return
        if path == "/metrics":
            self._answer(prometheus.CONTENT_TYPE, prometheus.render(seen).encode())
            return
        leases = [_row(line) for line in seen.leases]
        status = {"report": document(seen.report), "leases": leases, "history": history}
        self._answer("application/json", json.dumps(status).encode())

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self) -> None:
        self.send_response(405)
        self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("http %s: %s", self.client_address[0], format % args)


def _row(line: LeaseLine) -> dict[str, object]:
    """Return a lease as a row of the page's table, which is like that of `sharedpool who`."""
    return {
        "pool": line.pool,
        "process": process_name(line.title, line.pid, line.host),
        "thread": line.thread,
        "state": line.state,
        "for_ms": None if line.age_ms < 0 else line.age_ms,
        "backend": None if line.backend is None else line.backend.pid,
        "lease": str(line.token),
        "checked_out_at": line.stack[0] if line.stack else None,
    }


def _names_this_host(host: str) -> bool:
    """Return True if a Host header is one that no DNS server can make resolve to this host."""
    name = re.sub(r":\d+$", "", host).strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _close(client: socket.socket) -> None:
    try:
        client.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the client has disconnected
