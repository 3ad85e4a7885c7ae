"""A broker process around the real ledger: what `server.py` and `desk.py` do (its lanes:
`lane_keeper.py`; its control connection: `control.py`).

What the ledger's commands ask for is carried out by steps of the world, one by one. `fuse` kills
the broker in the middle of a batch of commands: those before are carried out, those after are lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sharedpool.broker.core.commands import (
    Admit,
    CancelBackend,
    CloseLane,
    Command,
    Dismiss,
    Erase,
    Fence,
    Forget,
    GiveInLane,
    HaltMoves,
    InviteToLane,
    JoinQueue,
    Log,
    MarkJournalComplete,
    OpenLane,
    PassOn,
    Process,
    Record,
    RecordServer,
    Send,
    StartMoves,
    SurveyServer,
    TransferCustody,
    VerifyServer,
    Watch,
)
from sharedpool.broker.core.ledger import Ledger
from sharedpool.broker.core.moves import UNCLAIMED
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.lane.lane import Ticket
from sharedpool.wire.admin import Order, OrderKind
from sharedpool.wire.board import BROKER_PLACE, BROKER_REQUEST, SHELF
from sharedpool.wire.codec import decode_to_broker, decode_to_worker, encode
from sharedpool.wire.desk import Deposit, Give, Leave, LineOwner, Moved, Opened
from sharedpool.wire.messages import Acquire, Grant, Hello, ToBroker
from sharedpool.wire.reports import FromOperator
from sharedpool.wire.values import Token
from tests.model.desk import checked
from tests.model.lane_keeper import LaneKeeper
from tests.model.network import Wire
from tests.model.scale import INSTANCE, LIMITS, TTL_S
from tests.model.server import Proc

if TYPE_CHECKING:
    from tests.model.world import World


class Broker(LaneKeeper):
    """One incarnation."""

    def __init__(self, world: World, epoch: int, *, follows: bool) -> None:
        super().__init__(world)
        self.fuse: int | None = None
        self.cannot_pass = False  # what is to be passed on next: too many descriptors are under way
        self.watched: dict[bytes, Process] = {}
        self.custody: dict[Token, Proc] = {}
        self.granted: dict[Token, tuple[bytes, int]] = {}
        self.arrivals: dict[str, list[tuple[bytes, int]]] = {}
        # What the present batch of commands grants.
        self._to_check: list[tuple[bytes, Grant | Moved]] = []
        self._handlers = self._make_handlers()
        journal = world.journal
        entries = journal.reopen()
        self.ledger = Ledger(
            epoch,
            max_conn=world.cap,
            ttl_s=TTL_S,
            journal_complete=journal.intact,
            instance=INSTANCE,
            desk="desk" if world.has_desk else "",
            handover=world.handover,
            groups=world.groups,
        )
        self._intact = journal.intact
        self._entries, self._members = entries, list(journal.members.values())
        self._follows = follows

    def take_over(self) -> None:
        """Begin where the former one ended."""
        self.reach_server()
        self.execute(self.ledger.takeover.restore(self._entries, self.world.now, self._members))
        self.execute(
            self.ledger.control.reached(self.world.now, direct=not self.world.proxied, fault="")
        )
        if self._follows and not self._intact:
            self.execute(self.ledger.takeover.begin_grace_period(TTL_S, self.world.now))
        else:
            self.world.journal.vouch()

    # --- orders

    def order(self, order: Order) -> None:
        _, commands = self.ledger.order(order, self.world.now)
        self.execute(commands)

    def restore_limits(self) -> None:
        orders = [Order(0, OrderKind.LIMIT, name, limit) for name, limit in LIMITS.items()]
        if self.world.cap is not None:
            orders.insert(0, Order(0, OrderKind.LIMIT, "", self.world.cap))
        for order in orders:
            if self.world.broker is self:  # its fuse may have killed it
                self.order(order)

    # --- output

    def execute(self, commands: list[Command]) -> None:
        self._to_check.clear()
        for command in commands:
            if self.fuse is not None:
                self.fuse -= 1
                if self.fuse < 0:
                    self.world.kill_broker(0)
                    return
            if self.world.broker is not self:
                return
            self._handlers[type(command)](command)
        self.ledger.check_invariants()
        assert self.world.journal.live.keys() == self.slots.leases.keys(), (
            "the journal differs from the records"
        )
        for session, grant in self._to_check:
            self._check_grant(session, grant)

    def _make_handlers(self) -> dict[type, Callable[[Any], None]]:
        """Return what carries out each kind of command, as `Executor` has it."""
        journal = self.world.journal
        return {
            Send: self._send,
            Log: lambda _: None,
            Record: lambda command: journal.record(command.entry),
            Erase: self._erase,
            Admit: lambda command: journal.admit(command.member),
            Dismiss: lambda command: journal.dismiss(command.session),
            RecordServer: lambda _: None,
            MarkJournalComplete: lambda _: journal.vouch(),
            TransferCustody: self._transfer_custody,
            PassOn: self._pass_on,
            InviteToLane: self._let_in,
            GiveInLane: self._to_lane,
            OpenLane: lambda command: self._open_lane(command.pool, command.serial),
            CloseLane: lambda command: self._close_lane(command.pool),
            JoinQueue: self._join_queue,
            StartMoves: lambda command: self.leaves_alone.add(command.pool),
            HaltMoves: self._halt_moves,
            Fence: self._fence,
            CancelBackend: self.interferes.append,
            SurveyServer: self.looks.append,
            VerifyServer: self.doubts.append,
            Watch: lambda command: self._watch(command.session, command.process),
            Forget: self._forget,
        }

    def _send(self, command: Send) -> None:
        session, message = command.session, command.message
        line = self.world.network.lines.get(session)
        if line is not None and session in self.world.workers:
            line.down.append(decode_to_worker(encode(message)))
        if isinstance(message, Grant):
            self._to_check.append((session, message))

    def _erase(self, command: Erase) -> None:
        self.world.journal.erase(command.token)
        self.fences.pop(command.token, None)
        self._drop(command.token)

    def _transfer_custody(self, command: TransferCustody) -> None:
        self.custody[command.heir] = self.custody.pop(command.token)

    def _forget(self, command: Forget) -> None:
        self.watched.pop(command.session, None)
        self.invited.pop(command.session, None)

    def _join_queue(self, command: JoinQueue) -> None:
        for _ in range(command.times):
            self.lanes[command.pool].queue(Ticket(SHELF, BROKER_PLACE, BROKER_REQUEST))
        self._take_later(command.pool, command.most_from_shelf)

    def _halt_moves(self, command: HaltMoves) -> None:
        self.leaves_alone.discard(command.pool)
        self._empty_later(command.pool)

    def _watch(self, session: bytes, process: Process | None) -> None:
        self.watched.pop(session, None)
        if process is None:
            return
        if process in self.world.processes:
            self.watched[session] = process
        else:
            self.calls.append(lambda ledger, now: ledger.session_died(session, now))

    def _fence(self, fence: Fence) -> None:
        held = self.custody.get(fence.token)
        if held is not None:
            held.cut = True
        if fence.backend is not None:
            self.fences[fence.token] = fence
            self._check_fence(fence)
            self._check_lost(fence)
        else:
            found = held is not None or fence.token in self.ledger._leases.quarantine
            assert found, f"nobody can find the backend of {fence.token}"

    def _check_fence(self, fence: Fence) -> None:
        """What is to be ended is not known to be what another lease has in good use."""
        for other in self.slots.leases.values():
            good = (
                other.state is SlotState.OPEN
                and other.backend == fence.backend
                and other.token != fence.token
            )
            assert not good, f"{other.token} is in good use, and {fence} would end its connection"

    def _check_lost(self, fence: Fence) -> None:
        """S5: what is ended since nobody has it any more is in nobody's hands."""
        if fence.why != UNCLAIMED:
            return
        self.world.lost += 1
        for worker in self.world.workers.values():
            users = [conn.proc for conn in worker.users if conn.works]
            hands = [thread.hand[1] for thread in worker.threads if thread.hand is not None]
            for proc in users + hands:
                assert proc.cut or proc.backend != fence.backend, (
                    f"{worker} has {proc!r}, which is ended as lost"
                )

    def _pass_on(self, order: PassOn) -> None:
        message = order.message
        proc = self.custody[message.token]
        assert not proc.workers, f"{proc!r} is passed on while {proc.workers} have it"
        assert not proc.dirty, f"{proc!r} is passed on with an open transaction"
        # A trial's has hit before its worker gives.
        cancelled = [
            order for order in self.interferes if order.backend == proc.backend and not order.trial
        ]
        assert not cancelled, f"{proc!r} is passed on: {cancelled} would hit its next user"
        fails, self.cannot_pass = self.cannot_pass, False
        end = self.lanes.get(order.pool)
        if fails or end is None or not end.pass_on(order.member_number, order.place, message, proc):
            self.calls.append(lambda ledger, now: ledger.lanes.not_delivered(message, now))
        else:
            self.world.passed += 1
        self._to_check.append((self.slots.leases[message.token].session.id, message))

    def _line_ended(self, number: int) -> None:
        self.calls.append(lambda ledger, now: ledger.desk.line_closed(number, now))

    def _check_grant(self, session: bytes, grant: Grant | Moved) -> None:
        sessions = self.slots.sessions
        assert grant.token in self.granted or not sessions[session].pool.paused, (
            f"{grant.token}: its pool is paused"
        )
        receiver = self.granted.setdefault(grant.token, (session, grant.request))
        assert receiver == (session, grant.request), f"{grant.token} was granted twice"
        for arrivals in self.arrivals.values():
            if (session, grant.request) in arrivals:
                ahead = arrivals[: arrivals.index((session, grant.request))]
                overtaken = [
                    each
                    for each in ahead
                    if self.queued(*each) and not sessions[each[0]].pool.paused
                ]
                assert not (self.world.in_order and overtaken), (
                    f"{overtaken} came before {session!r}"
                )
                arrivals.remove((session, grant.request))

    def queued(self, session: bytes, request: int) -> bool:
        known = self.slots.sessions.get(session)
        return known is not None and request in known.waiters

    # --- input

    def take_in(self, session: bytes, message: ToBroker) -> None:
        """Handle a message."""
        process = None
        if isinstance(message, Hello) and message.host == "here":
            process = self.world.process_of[session]
        if isinstance(message, Acquire):
            self._note_arrival(session, message)
        read = decode_to_broker(encode(message))
        assert not isinstance(read, FromOperator)
        self.execute(self.ledger.handle(session, read, self.world.now, process))

    def _note_arrival(self, session: bytes, message: Acquire) -> None:
        if message.wait_ms and not self.queued(session, message.request):
            known = self.slots.sessions.get(session)
            if known is not None and not known.restored and message.request not in known.granted:
                arrivals = self.arrivals.setdefault(known.pool.name, [])
                if (session, message.request) in arrivals:
                    arrivals.remove((session, message.request))
                arrivals.append((session, message.request))

    def read(self, wire: Wire) -> None:
        """Read one packet at the desk, or see that a line has ended."""
        wire.accepted = True
        if not wire.up:
            self.hang_up(wire)
            return
        packet = wire.up.popleft()
        proc, message, now = packet.take(), checked(packet), self.world.now
        match message:
            case Deposit(session, token):
                assert proc is not None
                self._take(session, token, proc)
            case Opened():
                self.execute(self.ledger.desk.opened(message, now))
            case Give():
                self.execute(self.ledger.desk.given(message, now))
            case LineOwner(session):
                self.desk_lines[session] = wire.number
                if (order := self.invited.get(session)) is not None:
                    self._let_in(order)
            case _:
                assert not isinstance(message, Leave)
                self.execute(
                    self.ledger.lanes.joined(message.session, now, takes_part=message.takes_part)
                )

    def hang_up(self, wire: Wire) -> None:
        """Close a line to the desk."""
        self.world.network.tear(wire)
        if self.desk_lines.get(wire.session) == wire.number:
            del self.desk_lines[wire.session]
        self._line_ended(wire.number)

    def _take(self, session: bytes, token: Token, proc: Proc) -> None:
        if token in self.custody or not self.ledger.desk.expects(session, token):
            return
        proc.holders.add("custody")
        self.custody[token] = proc
        self.execute(self.ledger.desk.deposited(token, self.world.now))

    def see(self, token: Token) -> None:
        """The end of a backend, or of the proxy's side, shows on its socket."""
        proc = self.custody[token]
        believed = self.ledger.believes(token)
        assert proc.dead or not believed, f"{proc!r} is believed to be gone"
        self._drop(token)
        if believed:
            self.execute(self.ledger.backend_gone(token, self.world.now))
        else:
            self.execute(self.ledger.ended_without_proof(token, self.world.now, peer_closed=True))

    def _drop(self, token: Token) -> None:
        held = self.custody.pop(token, None)
        if held is not None:
            held.holders.discard("custody")

    @property
    def endings(self) -> list[Token]:
        """What `see` can see."""
        return [
            token
            for token, proc in self.custody.items()
            if proc.dead or (proc.cut and self.world.proxied)
        ]

    def notice_death(self, session: bytes) -> None:
        """A pidfd fires: told after what has been read already."""
        del self.watched[session]
        self.calls.append(lambda ledger, now: ledger.session_died(session, now))

    @property
    def deaths(self) -> list[bytes]:
        """The sessions whose pidfds have fired."""
        return [
            session
            for session, process in self.watched.items()
            if process not in self.world.processes
        ]

    def hear_word(self) -> None:
        self.execute(self.calls.popleft()(self.ledger, self.world.now))

    def tick(self) -> None:
        self.execute(self.ledger.tick(self.world.now))

    def close(self) -> None:
        """It is dead: what it held open is open no longer."""
        for proc in self.custody.values():
            proc.holders.discard("custody")
        for pool in list(self.lanes):
            self._close_lane(pool)
