"""The exceptions sharedpool raises; every one is a `psycopg2.pool.PoolError`, so existing handlers keep working."""

from psycopg2 import OperationalError
from psycopg2.pool import PoolError as PoolError


class SharedPoolError(PoolError):
    """Parent of every error that sharedpool itself raises."""


class PoolExhausted(SharedPoolError):
    """The limit is reached and no idle connection could be recalled, for a caller that did not want to wait."""


class TooManyWaiting(PoolExhausted):
    """As many callers as `max_waiting` allows wait for this pool already."""


class ServerUnavailable(SharedPoolError, OperationalError):
    """PostgreSQL accepts no connections just now, as another connect has found; the text is the server's own."""


class ConnectRefused(SharedPoolError, OperationalError):
    """PostgreSQL has refused this process's last connect, and the next one is not due yet; the text is the server's."""


class SessionsNotKept(SharedPoolError):
    """The pool's connections go through a pooler that gives one session's backend to another between transactions."""


class PoolTimeout(SharedPoolError):
    """No connection became free within the caller's `timeout`."""


class PoolClosed(SharedPoolError):
    """The pool was disposed of by `release_all()`."""


class BrokerUnavailable(SharedPoolError):
    """The broker could not be reached (or started) by the caller's deadline."""


class ConfigError(SharedPoolError, ValueError):
    """An argument, an environment variable or a connection string cannot be used; the text names it."""


class ProtocolError(SharedPoolError):
    """A message from the other side cannot be understood; it is logged and dropped."""
