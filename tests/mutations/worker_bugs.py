"""Checkouts, connections and what is used again: bugs of the workers."""

from __future__ import annotations

from tests.mutations.mutant import Mutant

WORKER_BUGS = (
    Mutant(
        "a lease is released before its close is complete",
        (
            (
                "sharedpool/worker/connection/closing.py",
                ("            abandon(conn)\n        _end_sessions(closing, limit_s)\n"),
                "            conn.sharedpool_gone = True\n            abandon(conn)\n",
            ),
        ),
        # Faults alone do not show it where connections are handed over: what is recalled is given
        # then, not closed.
        ("tests/unit/test_close.py",),
    ),
    Mutant(
        "a worker's cut forges the evidence",
        (
            (
                "sharedpool/worker/connection/closing.py",
                ".shutdown(socket.SHUT_WR)",
                ".shutdown(socket.SHUT_RDWR)",
            ),
        ),
        ("tests/integration/test_evidence.py", "-k", "query"),
    ),
    Mutant(
        "a forked child closes inherited connections",
        (
            (
                "sharedpool/worker/local_pool.py",
                "disown(cast(PooledConnection, conn))",
                "super(PooledConnection, cast(PooledConnection, conn)).close()",
            ),
        ),
        ("tests/integration/test_processes.py", "-k", "fork"),
    ),
    Mutant(
        "a worker takes in a former broker's grant",
        (
            (
                "sharedpool/worker/core/broker_messages.py",
                "if grant.token.epoch != self._epoch:",
                "if False:",
            ),
            (
                "sharedpool/worker/link/link.py",
                "        elif registration.established:\n",
                "        else:\n",
            ),
        ),
        ("tests/unit/test_cache_grants.py", "tests/model"),
    ),
    Mutant(
        "a wait socket is free while an answer may still come",
        (
            (
                "sharedpool/worker/core/lease.py",
                (
                    "return not self.times_asked or (\n"
                    "            self.times_asked == 1 and (self.answered or self.denial is not "
                    "None)\n"
                    "        )"
                ),
                "return self.answered or self.denial is not None",
            ),
        ),
        ("tests/unit/test_cache_reports.py",),
    ),
    Mutant(
        "who gives a connection claims it still",
        (
            (
                "sharedpool/worker/core/broker_messages.py",
                "if lease.phase is Phase.CLOSING and lease.conn is None",
                "if False",
            ),
        ),
        ("tests/unit/test_cache_reports.py",),
    ),
    Mutant(
        "a dead idle connection is connected again under its old lease",
        (
            (
                "sharedpool/worker/checkout.py",
                (
                    "            self._give_up(lease, conn, reason)\n"
                    "            self._lease = self._wait()\n"
                ),
                "            conn.sharedpool_close()\n            lease.conn = None\n",
            ),
        ),
        ("tests/integration/test_pool_clean_connections.py", "-k", "without_the_brokers_word"),
    ),
    Mutant(
        "a grant that came with a WELCOME counts from then on",
        (
            (
                "sharedpool/worker/core/waiters.py",
                'asked_at if request == served else float("-inf")',
                "now",
            ),
        ),
        ("tests/unit/test_cache_grants.py", "-k", "along_with_a_welcome"),
    ),
    Mutant(
        "under gevent the link blocks the hub",
        (("sharedpool/worker/greenlets.py", "    return green\n", "    return zmq\n"),),
        ("tests/frameworks/test_gevent.py", "-k", "waiting_within", "--timeout", "30"),
    ),
    Mutant(
        "a second close ends what the pool may have lent again",
        (
            (
                "sharedpool/worker/connection/connection.py",
                (
                    "self.closed == closed_flag.SHUT\n"
                    "            or (returned is not None and returned.phase is Phase.IDLE)"
                ),
                "False",
            ),
        ),
        ("tests/frameworks/test_connect_method.py",),
    ),
    Mutant(
        "a connection that was put back stays open to its user",
        (
            (
                "sharedpool/worker/pool.py",
                "                    pooled.sharedpool_closed_flag = SHUT\n",
                "",
            ),
        ),
        ("tests/integration/test_kept_references.py", "-k", "fast_path"),
    ),
    Mutant(
        "a shell keeps the codec of its former session",
        (
            (
                "sharedpool/worker/connection/renewal.py",
                "return bool(shell.encoding == encoding) and ",
                "return ",
            ),
        ),
        ("tests/integration/test_shells.py", "-k", "codec"),
    ),
    Mutant(
        "the object of a user's own class is used for another session",
        (
            (
                "sharedpool/worker/connection/shells.py",
                "not (self.are_known and shell.sharedpool_emptied)\n            or ",
                "",
            ),
        ),
        ("tests/integration/test_shells_own_class.py", "-k", "own_class"),
    ),
    Mutant(
        "the answer to a reset is not read",
        (
            (
                "sharedpool/worker/connection/reset.py",
                "changed = _read(sock, time.monotonic() + min(limit_s, LIMIT_S))",
                "changed = {}",
            ),
        ),
        ("tests/unit/test_reset.py",),
    ),
    Mutant(
        "what is reset is given before the reset is sent",
        (
            (
                "sharedpool/worker/connection/handover.py",
                "return encoded if reset.send(descriptor_of(conn), command) else None",
                "return encoded",
            ),
        ),
        ("tests/integration/test_shells.py", "-k", "as_one_just_opened"),
    ),
    Mutant(
        "an object is used again whose libpq knows another session's parameters",
        (
            (
                "sharedpool/worker/connection/shells.py",
                " or parameters != shell.sharedpool_made_with",
                "",
            ),
            (
                "sharedpool/worker/connection/handover.py",
                "if encoded != conn.sharedpool_made_with:",
                "if False:",
            ),
        ),
        ("tests/integration/test_shells.py", "-k", "leaves_behind"),
    ),
    Mutant(
        "the application's log handlers run in the link's thread",
        (
            (
                "sharedpool/worker/logs.py",
                "        if not self.is_kept:\n",
                "        if self._logger:\n",
            ),
        ),
        ("tests/unit/test_logs.py",),
    ),
    Mutant(
        "a refused connect's code is read where another server's text stands",
        (
            (
                "sharedpool/postgres/libpq.py",
                "_SQLSTATE_ALONE = 3  # PQERRORS_SQLSTATE",
                "_SQLSTATE_ALONE = 1",
            ),
        ),
        ("tests/integration/test_refused.py",),
    ),
    Mutant(
        "a wait callback knows no limit while it connects",
        (
            (
                "sharedpool/worker/greenlets.py",
                '    conn.__dict__["poll"] = patient\n',
                '    conn.__dict__["poll"] = poll\n',
            ),
        ),
        ("tests/integration/test_refused.py", "--timeout=30", "-k", "wait_callback"),
    ),
)
