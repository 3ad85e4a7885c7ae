"""Where a pool finds its broker: at a given address, or by the server and the user."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from sharedpool.discovery import address as addresses
from sharedpool.postgres.conninfo import ConnInfo

if TYPE_CHECKING:
    from sharedpool.broker.settings import BrokerSettings


class GivenBroker(Struct, frozen=True):
    """A broker at a known address, which something else starts."""

    at: str
    is_automatic: bool = False

    def address(self) -> str:
        """Return the broker's address."""
        return self.at

    def start(self, address: str) -> None:
        """Raise, since only an automatic broker is started by its workers."""
        raise AssertionError(f"bug: the broker at {address} is not automatic")


class AutomaticBroker(Struct, frozen=True):
    """The broker that one user's processes share for all pools of one server and role.

    The user and the address are determined at the first use, because a program may be started as
    root and then change its user.
    """

    conninfo: ConnInfo
    is_automatic: bool = True

    def address(self) -> str:
        """Return the address for the current user of this process. Raise `ConfigError`."""
        return addresses.automatic_address(self.conninfo.identity().digest())

    def start(self, address: str) -> None:
        """Start the broker unless it runs. Blocks and raises as `ensure_running` does."""
        # Imported here, because most workers find a running broker, and these take 2 MB.
        from sharedpool.broker.launch.automatic import ensure_running, with_linger
        from sharedpool.broker.settings import BrokerSettings
        from sharedpool.discovery.scope import automatic_scope

        def settings() -> BrokerSettings:
            scope = automatic_scope(self.conninfo.identity().digest())
            return with_linger(
                BrokerSettings(address, dsn=self.conninfo.current(), scope=scope, automatic=True)
            )

        ensure_running(address, settings)
