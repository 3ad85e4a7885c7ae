"""Where a pool's broker is: at an address that was given, or the automatic one of its server and its user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharedpool.discovery import address as addresses
from sharedpool.postgres.conninfo import ConnInfo

if TYPE_CHECKING:
    from sharedpool.broker.settings import BrokerSettings


@dataclass(frozen=True, slots=True)
class GivenBroker:
    """A broker that somebody else starts, at a known address."""

    at: str
    is_automatic: bool = False

    def address(self) -> str:
        """Return its address."""
        return self.at

    def start(self, address: str) -> None:
        """Fail: nobody starts it from here."""
        raise AssertionError(f"bug: the broker at {address} is not automatic")


@dataclass(frozen=True, slots=True)
class AutomaticBroker:
    """The broker that the processes of one user share for all pools of one server, as one PostgreSQL user.

    Whose it is, and where, is decided when it is first needed: a program may be started as root and work as somebody
    else.
    """

    conninfo: ConnInfo
    is_automatic: bool = True

    def address(self) -> str:
        """Return its address for the user that this process runs as now. Raise `ConfigError`."""
        return addresses.automatic_address(self.conninfo.identity().digest())

    def start(self, address: str) -> None:
        """Start it unless it runs; blocks as `ensure_running` does, and raises what that raises."""
        # Here, since most workers find it running: it takes 2 MB.
        from sharedpool.broker.launch.automatic import ensure_running, with_linger
        from sharedpool.broker.settings import BrokerSettings
        from sharedpool.discovery.scope import automatic_scope

        def settings() -> BrokerSettings:
            scope = automatic_scope(self.conninfo.identity().digest())
            return with_linger(
                BrokerSettings(address, dsn=self.conninfo.current(), scope=scope, automatic=True)
            )

        ensure_running(address, settings)
