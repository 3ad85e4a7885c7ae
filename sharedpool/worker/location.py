"""Where a pool's broker is, and how to start an automatic one.

Both are decided when the broker is first needed (`broker_location.py`).
"""

from __future__ import annotations

from typing import Protocol


class BrokerLocation(Protocol):
    """The broker of one pool."""

    @property
    def is_automatic(self) -> bool:
        """Whether the pool starts a broker if none is running."""

    def address(self) -> str:
        """Return the address for the user that this process runs as now.

        May make a directory. Raise `ConfigError`.
        """

    def start(self, address: str) -> None:
        """Start an automatic broker, unless it is running; blocks until it answers.

        Raise `BrokerUnavailable`.
        """
