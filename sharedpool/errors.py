"""The exceptions of sharedpool.

Each is a `psycopg2.pool.PoolError`, so existing handlers keep working.
"""

from psycopg2 import OperationalError
from psycopg2.pool import PoolError as PoolError


class SharedPoolError(PoolError):
    """The parent of all errors that sharedpool raises."""


class PoolExhausted(SharedPoolError):
    """The limit is reached, no connection is idle anywhere, and the caller does not wait."""


class TooManyWaiting(PoolExhausted):
    """As many callers as `max_waiting` allows already wait for this pool."""


class ServerUnavailable(SharedPoolError, OperationalError):
    """PostgreSQL accepts no connections, as another connect has just found.

    The text is the server's own.
    """


class ConnectRefused(SharedPoolError, OperationalError):
    """PostgreSQL refused this process's last connect, and the next one is not due yet.

    The text is the server's own.
    """


class SessionsNotKept(SharedPoolError):
    """The connections go through a pooler that does not keep sessions (transaction pooling)."""


class PoolTimeout(SharedPoolError):
    """No connection became free within the caller's `timeout`."""


class PoolClosed(SharedPoolError):
    """The pool was disposed of by `release_all()`."""


class BrokerUnavailable(SharedPoolError):
    """The broker could not be reached, or not be started, by the caller's deadline."""


class ConfigError(SharedPoolError, ValueError):
    """An argument, environment variable or connection string is wrong; the text names it."""


class ProtocolError(SharedPoolError):
    """A message of the peer is malformed. It is logged and dropped."""
