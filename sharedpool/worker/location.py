"""Where a pool's broker is, and how it is started if nobody owns it: decided when it is first needed (`config.py`)."""

from __future__ import annotations

from typing import Protocol


class BrokerLocation(Protocol):
    """The broker of one pool."""

    @property
    def is_automatic(self) -> bool:
        """Whether a broker that is not there is started."""

    def address(self) -> str:
        """Return its address, for the user that this process runs as now. Raise `ConfigError`. May make a folder."""

    def start(self, address: str) -> None:
        """Make sure that it runs; blocks until it does. Raise `BrokerUnavailable`. Of an automatic one only."""
