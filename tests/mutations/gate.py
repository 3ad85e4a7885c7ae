"""Plant known bugs one by one, and see that the tests catch each: `python tests/mutations/gate.py
[NAME ...]`.

Each bug is a small edit of a copy of this tree; the tests named beside it must fail there (and pass
here). Prints a table; the exit status is 0 only if every bug is caught. `--list` names them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600


@dataclass(frozen=True)
class Mutant:
    """A bug: `edits` are (file, text, what it becomes); `tests` are pytest's arguments."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


MUTANTS = (
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
        "without a journal there is no grace period",
        (
            (
                "sharedpool/broker/core/takeover.py",
                "stop.holding_back = True",
                "stop.holding_back = False",
            ),
        ),
        ("tests/model", "tests/unit/test_recovery.py"),
    ),
    Mutant(
        "a restarted broker fences before workers could say HELLO",
        (("sharedpool/broker/core/fences.py", "and now >= lease.session.spared_until", ""),),
        ("tests/unit/test_recovery.py",),
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
        "a worker killed in its connect gives its slot back at once",
        (
            (
                "sharedpool/broker/core/sessions.py",
                "if lease.findable or not unused:",
                "if lease.findable:",
            ),
        ),
        ("tests/model", "tests/unit/test_recovery.py"),
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
        ("tests/model", "tests/unit/test_cache.py"),
    ),
    Mutant(
        "a connection on its way to who waits is taken for lost",
        (
            (
                "sharedpool/broker/core/handover.py",
                ("unconfirmed=True,\n            unconfirmed_since=now,"),
                "unconfirmed_since=now,",
            ),
        ),
        ("tests/unit/test_ledger_handover.py",),
    ),
    Mutant(
        "a connection is passed on with a cancel under way",
        (
            (
                "sharedpool/broker/core/handover.py",
                "lease.custody and not lease.cancels and",
                "lease.custody and",
            ),
        ),
        ("tests/model",),
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
        ("tests/unit/test_cache.py",),
    ),
    Mutant(
        "what could not be sent to who waits is taken for sent",
        (
            (
                "sharedpool/broker/core/handover.py",
                'self._leases.fence(lease, "it could not be passed on", now, level=logging.DEBUG)',
                "lease.unconfirmed = True",
            ),
        ),
        ("tests/unit/test_ledger_handover.py", "-k", "could_not_be_sent"),
    ),
    Mutant(
        "who was served in the lane stays in the broker's queue",
        (
            (
                "sharedpool/worker/core/waiters.py",
                "        if not waiter.broker_is_done:\n",
                "        if not waiter:\n",
            ),
        ),
        ("tests/unit/test_cache_handover.py", "-k", "served_by_either"),
    ),
    Mutant(
        "an invitation to the lane that comes before the WELCOME is declined",
        (("sharedpool/worker/session.py", " and local.registration.established:", ":"),),
        ("tests/integration/test_lane.py", "-k", "invited"),
    ),
    Mutant(
        "a waiter that is being let into the lane has its connection ended",
        (
            (
                "sharedpool/broker/core/handover.py",
                "if may_reach(waiter, pool, now):",
                "if not waiter:",
            ),
        ),
        ("tests/unit/test_ledger_handover.py", "-k", "worth_a_moment"),
    ),
    Mutant(
        "a connection whose socket finds no descriptor is waited for",
        (("sharedpool/lane/lane.py", "            self._refuse(moved)\n", "            pass\n"),),
        ("tests/unit/test_lane_ends.py", "-k", "not_as_it_should_be"),
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
        ("tests/unit/test_cache.py",),
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
        ("tests/integration/test_pool.py", "-k", "without_the_brokers_word"),
    ),
    Mutant(
        "a connection to one database is handed to a process that wants another",
        (
            (
                "sharedpool/broker/core/sessions.py",
                ("self._terms.handover\n            and hello.pool.server == pool.spec.server"),
                "self._terms.handover",
            ),
        ),
        ("tests/integration/test_handover.py", "-k", "different_databases"),
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
        ("tests/integration/test_shells.py", "-k", "own_class"),
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
        "a grant that came with a WELCOME counts from then on",
        (
            (
                "sharedpool/worker/core/waiters.py",
                'asked_at if request == served else float("-inf")',
                "now",
            ),
        ),
        ("tests/unit/test_cache.py", "-k", "along_with_a_welcome"),
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
        ("tests/integration/test_shells.py", "-k", "fast_path"),
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
    Mutant(
        "in the lane the board is written after the connection was sent",
        (
            (
                "sharedpool/lane/lane.py",
                "moves = self.board.set_holder(item.cell, holder)\n",
                "moves = 0\n",
            ),
            (
                "sharedpool/lane/lane.py",
                (
                    "            self.board.set_holder(item.cell, self.member_number)\n"
                    "            return False\n"
                    "        return True\n"
                ),
                (
                    "            return False\n        self.board.set_holder(item.cell, holder)\n"
                    "        return True\n"
                ),
            ),
        ),
        ("tests/unit/test_lane_ends.py", "-k", "on_its_way"),
    ),
    Mutant(
        "in the lane a ticket of a former turn is served",
        (
            (
                "sharedpool/lane/lane.py",
                "if self.board.is_waiting_at(ticket.place, ticket.request):",
                "if ticket.request:",
            ),
        ),
        ("tests/unit/test_lane_ends.py", "-k", "stale"),
    ),
    Mutant(
        "in the lane there is no second look after shelving",
        (("sharedpool/lane/lane.py", "while self._is_queued():", "while not self:"),),
        ("tests/unit/test_lane_ends.py", "-k", "second_look"),
    ),
    Mutant(
        "in the lane the shelf is not looked at after the ticket was written",
        (
            (
                "sharedpool/worker/mover.py",
                "                    if (got := wait_socket.take_from_shelf()) is not None:\n",
                "                    if got is not None:\n",
            ),
        ),
        ("tests/unit/test_mover.py", "-k", "after_the_ticket"),
    ),
    Mutant(
        "in the lane a connection of an older generation is taken in",
        (("sharedpool/lane/lane.py", " and moved.live.generation == self.board.generation", ""),),
        ("tests/unit/test_lane_ends.py", "-k", "dropped and generation"),
    ),
    Mutant(
        "in the lane a full shelf keeps what was not laid there",
        (
            (
                "sharedpool/lane/lane.py",
                (
                    "            self.board.set_holder(item.cell, self.member_number)\n            "
                    "return False\n"
                ),
                "            return False\n",
            ),
        ),
        ("tests/unit/test_lane_ends.py", "-k", "full_shelf"),
    ),
    Mutant(
        "a lane reads, writes and closes whatever has its descriptors' numbers",
        (
            (
                "sharedpool/lane/lane.py",
                "return self.open and is_still(fd, self._known.get(fd, ()))",
                "return self.open",
            ),
        ),
        ("tests/unit/test_lane_ends.py", "-k", "somebody_elses"),
    ),
    Mutant(
        "what moves is given before its reset's answer is read",
        (
            (
                "sharedpool/worker/mover.py",
                "if parameters_after(sock, live.parameters, limit_s) is not live.parameters:",
                "if not live.parameters:",
            ),
        ),
        ("tests/unit/test_mover.py", "-k", "when_its_reset_is_done"),
    ),
    Mutant(
        "what moves may leave half a message behind",
        (
            (
                "sharedpool/worker/connection/handover.py",
                "conn.sharedpool_emptied = probe.is_passed(conn)",
                "conn.sharedpool_emptied = True",
            ),
        ),
        ("tests/unit/test_mover.py", "-k", "half_a_message"),
    ),
    Mutant(
        "what was passed in the lane and has not arrived is never asked for",
        (
            (
                "sharedpool/broker/core/in_transit.py",
                "lease.unconfirmed, lease.unconfirmed_since, lease.confirm_recall = True, now, 0",
                "lease.unconfirmed_since = now",
            ),
        ),
        ("tests/unit/test_moves.py", "-k", "has_not_arrived"),
    ),
    Mutant(
        "what was passed in the lane is ended before it can have arrived",
        (
            (
                "sharedpool/broker/core/in_transit.py",
                "            if now - lease.unconfirmed_since >= ARRIVAL_S and not unsure:\n",
                "            if lease:\n",
            ),
        ),
        ("tests/unit/test_moves.py", "-k", "quarter_of_a_second"),
    ),
    Mutant(
        "what is on nobody's shelf is never ended",
        (
            (
                "sharedpool/broker/core/in_transit.py",
                'self._leases.fence(lease, "it is not on its pool\'s shelf", now)',
                "pass",
            ),
        ),
        ("tests/unit/test_moves.py", "-k", "never_reached_the_shelf"),
    ),
    Mutant(
        "connections move again before the shelf was looked at",
        (
            (
                "sharedpool/broker/core/moves.py",
                "return pool.shelf is None or not any(",
                "return True or not any(",
            ),
        ),
        ("tests/unit/test_moves.py", "-k", "searched_for_its_connection"),
    ),
    Mutant(
        "a later broker does not know how often a lease has moved",
        (
            (
                "sharedpool/broker/core/recovery.py",
                ", granted_at=now, moves=entry.moves",
                ", granted_at=now",
            ),
        ),
        ("tests/unit/test_moves.py", "-k", "later_broker"),
    ),
    Mutant(
        "who had a lease before is believed to have it now",
        (("sharedpool/broker/core/in_transit.py", " or not newer or ", " or "),),
        ("tests/unit/test_moves.py", "-k", "fewer_moves"),
    ),
    Mutant(
        "a former holder's late word takes a lease from its next",
        (
            (
                "sharedpool/broker/core/in_transit.py",
                "return lease is not None and lease.moves >= 0 and",
                "return lease is None and",
            ),
        ),
        ("tests/unit/test_moves.py", "-k", "late_message"),
    ),
    Mutant(
        "what is kept for a slice of time is forgotten when another one is given",
        (
            (
                "sharedpool/worker/mover.py",
                "if self._timer is not None and not cache.idle:",
                "if self._timer is not None:",
            ),
        ),
        ("tests/unit/test_mover.py", "-k", "leaves_the_timer_set"),
    ),
    Mutant(
        "in the lane the turns of a dead process go on",
        (
            (
                "sharedpool/broker/core/lane_members.py",
                "lane.board.clear_session(session.index)\n            "
                "lane.indices.discard(session.index)\n",
                "lane.indices.discard(session.index)\n",
            ),
        ),
        ("tests/unit/test_moves.py", "-k", "index_is_used_again"),
    ),
    Mutant(
        "connections move past a slot that is free",
        (
            (
                "sharedpool/broker/core/moves.py",
                "pool.room > 0 or pool.parked",
                "pool.parked",
            ),
        ),
        ("tests/unit/test_moves.py", "-k", "something_else and slot"),
    ),
    Mutant(
        "what has come in the lane and was not taken in is not listed",
        (
            (
                "sharedpool/worker/core/reporting.py",
                "lease_reports(self._leases.values(), now, threads) + self._arriving()",
                "lease_reports(self._leases.values(), now, threads)",
            ),
        ),
        ("tests/unit/test_cache_handover.py", "-k", "not_taken_in_is_listed"),
    ),
    Mutant(
        "who waits in the lane is served before his turn",
        (
            (
                "sharedpool/worker/core/cache.py",
                "            if not waiter.waits_for_move:\n",
                "            if waiter:\n",
            ),
        ),
        ("tests/unit/test_cache_handover.py", "-k", "before_its_turn"),
    ),
    Mutant(
        "a host's share grows by more than is free",
        (
            (
                "sharedpool/broker/core/shares.py",
                "taken = max(0, min(fair[mine] - now_held, free))",
                "taken = max(0, fair[mine] - now_held)",
            ),
        ),
        ("tests/unit/test_shares.py",),
    ),
    Mutant(
        "a host gives back slots that are in use",
        (
            (
                "sharedpool/broker/core/shares.py",
                "now_held = min(held, claim.least)",
                "now_held = min(held, claim.wanted)",
            ),
        ),
        ("tests/unit/test_shares.py",),
    ),
    Mutant(
        "a host whose session has ended is taken for gone at once",
        (("sharedpool/broker/core/host_presence.py", "GONE_S = 1.0", "GONE_S = 0.0"),),
        ("tests/unit/test_host_presence.py",),
    ),
    Mutant(
        "the outcome of an older sync counts",
        (
            (
                "sharedpool/broker/core/sharing.py",
                "if share is None or share.pending != serial:",
                "if share is None:",
            ),
        ),
        ("tests/unit/test_share_outcomes.py",),
    ),
    Mutant(
        "backends of brokers without a row are not counted",
        (
            (
                "sharedpool/broker/core/host_presence.py",
                "if instance not in rows",
                "if instance in rows",
            ),
        ),
        ("tests/unit/test_host_presence.py",),
    ),
    Mutant(
        "a broker opens connections after it was suspended",
        (
            (
                "sharedpool/broker/core/share_trust.py",
                'self.freeze(share, now, "")',
                "pass",
            ),
        ),
        ("tests/unit/test_share_outcomes.py",),
    ),
)


def plant(mutant: Mutant, tree: Path) -> None:
    """Edit the copy; raise when the code has moved on and the edit fits no more."""
    for name, old, new in mutant.edits:
        path = tree / name
        text = path.read_text()
        if text.count(old) != 1:
            raise SystemExit(
                f"{mutant.name}: {name} has {text.count(old)} places like {old!r}, not one"
            )
        path.write_text(text.replace(old, new))


def verdict(mutant: Mutant) -> tuple[bool, str]:
    """Run the tests on a tree with the bug; say whether they caught it, and how."""
    with tempfile.TemporaryDirectory(prefix="sharedpool-mutant-") as folder:
        tree = Path(folder, "tree")
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "dist", "build")
        shutil.copytree(ROOT, tree, ignore=ignored)
        plant(mutant, tree)
        environment = dict(
            os.environ,
            PYTHONPATH=str(tree),
            PYTHONDONTWRITEBYTECODE="1",
            SHAREDPOOL_MODEL_EXAMPLES="56",
        )
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "-m",
            "long or not long",
            *mutant.tests,
        ]
        try:
            outcome = subprocess.run(
                command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return False, f"the tests did not end within {LIMIT_S} s"
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", outcome.stdout, re.MULTILINE)
        return outcome.returncode == 1 and bool(failed), failed[0] if failed else outcome.stdout[
            -200:
        ].strip()


def main() -> int:
    """Run all mutants, or those whose names contain an argument."""
    if "--list" in sys.argv:
        print("\n".join(mutant.name for mutant in MUTANTS))
        return 0
    chosen = [
        m for m in MUTANTS if len(sys.argv) < 2 or any(word in m.name for word in sys.argv[1:])
    ]
    missed = 0
    for mutant in chosen:
        started = time.monotonic()
        caught, how = verdict(mutant)
        missed += not caught
        print(
            f"{'caught' if caught else 'MISSED'}  {mutant.name}  ({how}, "
            f"{time.monotonic() - started:.0f} s)",
            flush=True,
        )
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
