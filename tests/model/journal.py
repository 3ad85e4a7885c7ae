"""A broker's journal, as far as it outlives the broker."""

from __future__ import annotations

import msgspec

from sharedpool.broker.core.commands import Entry, Member
from sharedpool.wire.values import Token


class Journal:
    """What outlives a broker."""

    def __init__(self) -> None:
        self.lines: list[Entry | Member | Token | bytes] = []
        self.live: dict[Token, Entry] = {}
        self.members: dict[bytes, Member] = {}  # of lanes
        self.intact = False  # nobody has written it yet

    def record(self, entry: Entry) -> None:
        self.lines.append(entry)
        self.live[entry.token] = entry

    def erase(self, token: Token) -> None:
        if self.live.pop(token, None) is not None:
            self.lines.append(token)

    def admit(self, member: Member) -> None:
        self.lines.append(member)
        self.members[member.session] = member

    def dismiss(self, session: bytes) -> None:
        if self.members.pop(session, None) is not None:
            self.lines.append(session)

    def damage(self, kept: int) -> None:
        """Lose all but the first `kept` lines."""
        self.lines = self.lines[: kept % (len(self.lines) + 1)]
        self.intact = False

    def reopen(self) -> list[Entry]:
        """Read it as the next broker does."""
        self.live, self.members = {}, {}
        for line in self.lines:
            if isinstance(line, Entry):
                self.live[line.token] = msgspec.json.decode(msgspec.json.encode(line), type=Entry)
            elif isinstance(line, Member):
                self.members[line.session] = msgspec.json.decode(
                    msgspec.json.encode(line), type=Member
                )
            elif isinstance(line, Token):
                self.live.pop(line, None)
            else:
                self.members.pop(line, None)
        self.lines = [*self.live.values(), *self.members.values()]
        return list(self.live.values())

    def vouch(self) -> None:
        self.intact = True
