"""A broker that is killed, and its successor with the same journal."""

from __future__ import annotations

from sharedpool.broker.core.commands import Admit, Dismiss, Entry, Erase, Member, Record
from sharedpool.wire.values import Token
from tests.unit.ledger_driver import EPOCH, Broker, Worker


def journal_of(broker: Broker) -> list[Entry]:
    """What a journal would hold after all that was ordered."""
    entries: dict[Token, Entry] = {}
    for command in broker.commands:
        if isinstance(command, Record):
            entries[command.entry.token] = command.entry
        elif isinstance(command, Erase):
            entries.pop(command.token, None)
    return list(entries.values())


def members_of(broker: Broker) -> list[Member]:
    """Who is in its lanes, by that journal."""
    members: dict[bytes, Member] = {}
    for command in broker.commands:
        if isinstance(command, Admit):
            members[command.member.session] = command.member
        elif isinstance(command, Dismiss):
            members.pop(command.session, None)
    return list(members.values())


def successor(broker: Broker) -> Broker:
    """A new broker with the journal of one that was killed."""
    after = Broker(EPOCH + 1, journal_complete=True)
    after.take_in(after.ledger.takeover.restore(journal_of(broker), after.now, members_of(broker)))
    return after


def moved(worker: Worker, after: Broker) -> Worker:
    """The same worker process, at the new broker."""
    again = Worker(after, worker.name, worker.spec)
    again.held, again.seen, again.requests = dict(worker.held), worker.seen, worker.requests
    return again
