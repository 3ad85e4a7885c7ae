"""Connections that go from one process to another, by the broker and in the lane: bugs of both
sides."""

from __future__ import annotations

from tests.mutations.mutant import Mutant

HANDOVER_BUGS = (
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
        ("tests/unit/test_cache_lane.py", "-k", "served_by_either"),
    ),
    Mutant(
        "an invitation to the lane that comes before the WELCOME is declined",
        (("sharedpool/worker/session.py", " and local.registration.established:", ":"),),
        ("tests/unit/test_invitations.py",),
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
        ("tests/unit/test_ledger_handover_recalls.py", "-k", "worth_a_moment"),
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
        "a connection whose socket finds no descriptor is waited for",
        (("sharedpool/lane/lane.py", "            self._refuse(moved)\n", "            pass\n"),),
        ("tests/unit/test_lane_dropped_packets.py", "-k", "not_as_it_should_be"),
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
        ("tests/unit/test_lane_dropped_packets.py", "-k", "dropped and generation"),
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
        ("tests/unit/test_lane_closing.py", "-k", "somebody_elses"),
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
        "a trial's outcome is lost with its connection's token",
        (
            (
                "sharedpool/broker/core/handover.py",
                "if (pool := self._slots.pools.get(order.pool)) is None:",
                "pool = self._slots.pools.get(order.pool)\n"
                "        if pool is None or order.token not in self._slots.leases:",
            ),
        ),
        ("tests/unit/test_ledger_handover_cancels.py", "-k", "passed_on_meanwhile"),
    ),
    Mutant(
        "a child that nobody saw gives its parent's connection to those who wait",
        (
            (
                "sharedpool/worker/pool.py",
                "laid and (local := self._own_local()).cache is cache:",
                "laid and (local := self._local).cache is cache:",
            ),
        ),
        ("tests/integration/test_blind_forks.py", "-k", "clean_connection"),
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
        ("tests/unit/test_moves_in_transit.py", "-k", "has_not_arrived"),
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
        ("tests/unit/test_moves_in_transit.py", "-k", "quarter_of_a_second"),
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
        ("tests/unit/test_moves_shelf.py", "-k", "never_reached_the_shelf"),
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
        ("tests/unit/test_moves_dead_workers.py", "-k", "searched_for_its_connection"),
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
        ("tests/unit/test_moves_restart_claims.py", "-k", "later_broker"),
    ),
    Mutant(
        "who had a lease before is believed to have it now",
        (("sharedpool/broker/core/in_transit.py", " or not newer or ", " or "),),
        ("tests/unit/test_moves_restart_claims.py", "-k", "fewer_moves"),
    ),
    Mutant(
        "what arrives where the journal has it already is nobody's",
        (
            (
                "sharedpool/broker/core/in_transit.py",
                "least = 0 if lease.session.shelf else 1",
                "least = 1",
            ),
        ),
        ("tests/unit/test_moves_restart_members.py", "-k", "journal_has_it_already"),
    ),
    Mutant(
        "a worker without leases is believed to receive none in a former broker's lane",
        (
            (
                "sharedpool/broker/core/moves.py",
                "        if session.ended:\n            self.former",
                "        if session is not None:\n            self.former",
            ),
        ),
        ("tests/unit/test_moves_restart_members.py", "-k", "is_waited_for"),
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
        ("tests/unit/test_moves_board.py", "-k", "late_message"),
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
        ("tests/unit/test_mover_slices.py", "-k", "leaves_the_timer_set"),
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
        ("tests/unit/test_moves_lane.py", "-k", "index_is_used_again"),
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
        ("tests/unit/test_moves_begin_and_halt.py", "-k", "something_else and slot"),
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
        ("tests/unit/test_cache_lane.py", "-k", "not_taken_in_is_listed"),
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
        ("tests/unit/test_cache_lane.py", "-k", "before_its_turn"),
    ),
    Mutant(
        "a list from before the last move counts as the arrival",
        (
            (
                "sharedpool/broker/core/reconciler.py",
                "if lease.unconfirmed and report.moves != max(0, lease.moves):",
                "if False:",
            ),
        ),
        ("tests/unit/test_moves_in_transit.py",),
    ),
)
