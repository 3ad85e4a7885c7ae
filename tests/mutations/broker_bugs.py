"""What is granted, counted and ended: bugs of the broker."""

from __future__ import annotations

from tests.mutations.mutant import Mutant

BROKER_BUGS = (
    Mutant(
        "a slot is free when its TTL has passed",
        (
            (
                "sharedpool/broker/core/sessions.py",
                'self._slots.move(lease, SlotState.SUSPECT, "TTL passed")',
                'self._leases.free(lease, "TTL passed")',
            ),
        ),
        ("tests/model",),
    ),
    Mutant(
        "an unknown lease in a RENEW is admitted again",
        (
            (
                "sharedpool/broker/core/reconciler.py",
                "if lease is None and claim and self._leases.is_claimable(report.token):",
                "if lease is None:",
            ),
        ),
        ("tests/model",),
    ),
    Mutant(
        "a worker killed in its connect gives its slot back at once",
        (
            (
                "sharedpool/broker/core/sessions.py",
                "if lease.findable or not unused:",
                "if lease.findable:",
            ),
        ),
        ("tests/unit/test_ledger_quarantine.py", "tests/model"),
    ),
    Mutant(
        "without a journal there is no grace period",
        (
            (
                "sharedpool/broker/core/takeover.py",
                "stop.holding_back = True",
                "stop.holding_back = False",
            ),
        ),
        ("tests/unit/test_grace_period.py", "tests/model"),
    ),
    Mutant(
        "a restarted broker fences before workers could say HELLO",
        (("sharedpool/broker/core/fences.py", "and now >= lease.session.spared_until", ""),),
        ("tests/unit/test_recovery.py",),
    ),
    Mutant(
        "a restarted broker grants without knowing what is held",
        (
            (
                "sharedpool/broker/server/journal.py",
                "self.entries = self._load()",
                "self.entries, self.intact = [], True",
            ),
        ),
        ("tests/integration/test_shutdown.py", "-k", "knows_them_at_once or died_with_the_broker"),
    ),
    Mutant(
        "no lock file",
        (
            (
                "sharedpool/discovery/lock_file.py",
                "while not _try_lock(fd, fcntl.LOCK_EX):",
                "while False:",
            ),
        ),
        ("tests/faults", "-k", "second"),
    ),
    Mutant(
        "slots are counted by numbers instead of ids",
        (
            (
                "sharedpool/broker/core/records.py",
                "@dataclass(slots=True, eq=False)\nclass Lease:",
                "_COUNT: dict[int, int] = {}\n\n\n@dataclass(slots=True, eq=False)\nclass Lease:",
            ),
            (
                "sharedpool/broker/core/records.py",
                "return limit - len(self.leases)",
                "return limit - _COUNT.get(id(self), 0)",
            ),
            (
                "sharedpool/broker/core/slots.py",
                (
                    "        self.mark_returns_due(session, session.returns_due)\n        "
                    "self._record(lease)\n"
                ),
                (
                    "        self.mark_returns_due(session, session.returns_due)\n"
                    "        self._record(lease)\n"
                    "        from sharedpool.broker.core.records import _COUNT\n"
                    "\n"
                    "        _COUNT[id(pool)] = _COUNT.get(id(pool), 0) + 1\n"
                ),
            ),
            (
                "sharedpool/broker/core/lease_messages.py",
                (
                    "        lease = session.leases.get(release.token)\n"
                    "        if lease is None:\n"
                    "            lease = self._moves.transit.closed_in_transit(session, release)\n"
                    "        if release.token in session.vanished:"
                ),
                (
                    "        from sharedpool.broker.core.records import _COUNT\n"
                    "\n"
                    "        _COUNT[id(session.pool)] = _COUNT.get(id(session.pool), 0) - 1\n"
                    "        lease = session.leases.get(release.token)\n"
                    "        if lease is None:\n"
                    "            lease = self._moves.transit.closed_in_transit(session, release)\n"
                    "        if release.token in session.vanished:"
                ),
            ),
        ),
        ("tests/model",),
    ),
    Mutant(
        "a proxy's end is taken for the backend's",
        (
            (
                "sharedpool/broker/core/routes.py",
                "return self.is_direct(lease.pool) if lease.backend is None else "
                "lease.backend.direct",
                "return True",
            ),
        ),
        ("tests/unit/test_ledger_proxies.py",),
    ),
    Mutant(
        "a proxy is not found out",
        (
            (
                "sharedpool/postgres/route.py",
                "return ours == (_address(*ends[0]), _address(*ends[1]))",
                "return True",
            ),
        ),
        ("tests/integration/test_proxies.py", "-k", "found_out or socket_to_nobody"),
    ),
    Mutant(
        "a paused pool goes on lending",
        (
            (
                "sharedpool/broker/core/records.py",
                "return 0 if self.paused else min(self.max_conn, self.allowed)",
                "return min(self.max_conn, self.allowed)",
            ),
        ),
        ("tests/unit/test_admin.py",),
    ),
    Mutant(
        "what is reserved for a group is lent to others",
        (
            (
                "sharedpool/broker/core/groups.py",
                "cap - self.reserved - self.beyond + group.unused",
                "cap - self.beyond",
            ),
        ),
        ("tests/unit/test_groups.py",),
    ),
    Mutant(
        "connections of an unknown group count in none",
        (
            (
                "sharedpool/broker/core/records.py",
                " - sum(len(pool.leases) for pool in self.unknown)",
                "",
            ),
        ),
        ("tests/unit/test_groups.py",),
    ),
    Mutant(
        "a worker with a wrong password holds everybody back",
        (
            (
                "sharedpool/broker/core/failover.py",
                "if not concerns_all(release.code, unreachable=release.unreachable):",
                "if not release.error:",
            ),
        ),
        ("tests/unit/test_connect_refusals.py",),
    ),
    Mutant(
        "who is refused may try again at once, again and again",
        (
            (
                "sharedpool/broker/core/scheduler.py",
                "if not self._deny_refused(waiter, now):",
                "if waiter.session:",
            ),
        ),
        ("tests/unit/test_connect_refusals.py",),
    ),
    Mutant(
        "who is refused makes others give up their connections",
        (
            (
                "sharedpool/broker/core/scheduler.py",
                ("        if self._newcomers:\n            self._deny_newcomers(now)\n"),
                "",
            ),
        ),
        ("tests/unit/test_connect_refusals.py",),
    ),
    Mutant(
        "a server is known by its address alone",
        (
            (
                "sharedpool/broker/postgres/control_connection.py",
                "if server.system is not None and not self._is_pooled:",
                "if False:",
            ),
        ),
        ("tests/integration/test_server_replaced.py",),
    ),
    Mutant(
        "a copy of the database takes the place of the real one",
        (
            (
                "sharedpool/broker/postgres/control_connection.py",
                'f"primary of {server.system} at {hosts}"',
                'f"primary of {server.system}"',
            ),
        ),
        ("tests/integration/test_server_replaced.py",),
    ),
    Mutant(
        "a former primary that starts again takes the new one's place",
        (
            (
                "sharedpool/broker/core/seen_servers.py",
                "return (present.timeline, present.boot_us) > (former.timeline, former.boot_us)",
                "return True",
            ),
        ),
        ("tests/unit/test_seen_servers.py", "tests/integration/test_server_replaced.py"),
    ),
)
