"""Where to connect: resolved from arguments and environment, and never shown with a secret."""

import os
import pwd
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import psycopg2
from msgspec import Struct, field
from psycopg2.extensions import connection, make_dsn, parse_dsn

from sharedpool.digests import digest_of
from sharedpool.errors import ConfigError
from sharedpool.postgres import libpq

_URL_PREFIXES = ("postgres://", "postgresql://")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_KEYWORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# Keywords that say where to connect. If one is given, DATABASE_* is ignored.
_LOCATION = frozenset({"host", "hostaddr", "port", "dbname", "user", "password", "service"})
_LOCATION_VARIABLES = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE")
# Keywords by which processes find their broker. A function could give each another value.
_SERVER = frozenset({"host", "hostaddr", "port", "dbname", "database", "service"})
SECRET = re.compile(r"password|secret|scram_\w+_key")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_PORTS = re.compile(r"[0-9, ]*")
_REFUSED_SSLMODE = "resolve-only"


class ServerIdentity(NamedTuple):
    """A database and the role that connects to it, as libpq resolves them."""

    host: str
    port: str
    dbname: str
    user: str

    def digest(self) -> str:
        """Return 16 hex digits for server and role. Processes with the same digest share a broker.

        The database is left out, since one broker serves all databases of a server.
        """
        text = "\0".join((self.host, self.port, self.user))  # libpq's values cannot contain NUL
        return digest_of(text.encode("utf-8", "surrogateescape")).hex()

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}/{self.dbname}"


class ConnInfo(Struct, frozen=True, eq=False):
    """The arguments of `psycopg2.connect`. The repr hides secrets, `dsn` does not."""

    # The connection string as it was resolved.
    dsn: str
    # psycopg2's own keywords, which are no part of the connection string.
    python_kwargs: Mapping[str, Any] = field(default_factory=dict)
    # Returns the present connection string, if a part of it was given as a function.
    ask: Callable[[], str] | None = None
    # The keywords that were given as such, to be passed on as such.
    named: tuple[str, ...] = ()
    # A connection string or a URL was given, too.
    based: bool = True
    _known: dict[tuple[object, ...], ServerIdentity] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConnInfo) and self._given() == other._given()

    def __hash__(self) -> int:
        return hash(self.dsn)

    def _given(self) -> tuple[object, ...]:
        return self.dsn, self.python_kwargs, self.ask, self.named, self.based

    def current(self) -> str:
        """Return the connection string for one connect.

        Calls functions that were given in place of values, which may block. Raise their errors, and
        `ConfigError` if libpq cannot take what they return. No error names a secret, unless a
        function's own does.
        """
        return self.dsn if self.ask is None else self.ask()

    def arguments(self, current: str) -> tuple[str | None, dict[str, str]]:
        """Return the string and keywords to pass to `psycopg2.connect`, divided as they were given.

        A wrapper of `psycopg2.connect` may look at either.
        """
        if not self.named:
            return current, {}
        found = parse_dsn(current)
        keywords: dict[str, str] = {}
        for name in self.named:
            if (value := found.pop("dbname" if name == "database" else name, None)) is not None:
                keywords[name] = value
        return current if self.based else make_dsn(**found) or None, keywords

    def identity(self) -> ServerIdentity:
        """Return the server as libpq resolves it from arguments, service file, `PG*` and defaults.

        May read the service file, but not the network. Raise ConfigError for a service that libpq
        cannot find.
        """
        # Cached: libpq takes a tenth of the time of a process's first checkout, which asks twice.
        source = (os.geteuid(), *map(os.environ.get, _LOCATION_VARIABLES))
        identity = self._known.get(source)
        if identity is None:
            identity = self._identity()
            self._known.clear()
            # A service's file may change.
            if not (os.environ.get("PGSERVICE") or "service" in parse_dsn(self.dsn)):
                self._known[source] = identity
        return identity

    def _identity(self) -> ServerIdentity:
        found = _resolve_by_libpq(self.dsn) or _resolve_by_hand(parse_dsn(self.dsn))
        user = found.get("user") or ""
        # If both are given, libpq connects to hostaddr, and host is only a name for it.
        host = found.get("hostaddr") or found.get("host") or "local"
        return ServerIdentity(host, found.get("port") or "5432", found.get("dbname") or user, user)

    def __repr__(self) -> str:
        found = _try_parse(self.dsn)
        # A string that resolve() has not checked. A repr must not raise, least of all quote it.
        if isinstance(found, str):
            return "ConnInfo(<unusable>)"
        shown = {key: "***" if SECRET.search(key) else value for key, value in found.items()}
        extra = "".join(f", {name}=..." for name in self.python_kwargs)
        return f"ConnInfo({make_dsn(**shown)!r}{extra})"


def resolve(
    dsn: str | Callable[[], str] | None = None,
    db_url: str | None = None,
    environ: Mapping[str, str] | None = None,
    **connect_kwargs: Any,
) -> ConnInfo:
    """Merge arguments and environment into one ConnInfo.

    In order of precedence:

    1. Arguments. A keyword that says where to connect (host, port, dbname, user, ...) replaces
       DATABASE_*. Others (sslmode, cursor_factory, ...) are added to it.
    2. DATABASE_DSN, then DATABASE_URL.
    3. libpq's own environment, which libpq reads when it connects.

    `dsn` may be a function without arguments, and so may a keyword's value that does not name the
    server (password, sslkey, ...). Functions are called at every connect, that of `dsn` here, too.
    Raise ConfigError, which names the argument and never a secret.
    """
    environ = os.environ if environ is None else environ
    if dsn is not None and db_url is not None:
        raise ConfigError("dsn= and db_url= were both given; pass one of them")
    keywords, python_kwargs, asked = _split_keywords(connect_kwargs)
    located = not _LOCATION.isdisjoint(keywords.keys() | asked.keys())
    explicit = dsn is not None or db_url is not None or located

    origin, base = "", dict[str, str]()
    if dsn is not None:
        origin, base = "dsn=", _parse_dsn("dsn=", dsn() if callable(dsn) else dsn)
    elif db_url is not None:
        origin, base = "db_url=", _parse_url("db_url=", db_url)
    elif not explicit and (text := environ.get("DATABASE_DSN")):
        origin, base = "DATABASE_DSN", _parse_dsn("DATABASE_DSN", text)
    elif not explicit and (text := environ.get("DATABASE_URL")):
        origin, base = "DATABASE_URL", _parse_url("DATABASE_URL", text)

    merged = base | keywords
    # libpq would complain only when it connects. In a URL without @host the password is in the
    # port's place.
    if not _PORTS.fullmatch(merged.get("port", "")):
        raise ConfigError(
            f"{'port=' if 'port' in keywords else origin} has a port that is not a number"
        )
    somewhere = base or located or any(environ.get(name) for name in _LOCATION_VARIABLES)
    if not somewhere:
        raise ConfigError(
            "nothing to connect to: pass dsn=, db_url= or keywords such as host= and dbname=,"
            " or set DATABASE_DSN, DATABASE_URL"
            f" or one of {', '.join(_LOCATION_VARIABLES)}"
        )

    def ask() -> str:
        fresh = (_parse_dsn("dsn=", dsn()) if callable(dsn) else base) | keywords
        for name, function in asked.items():
            answer: dict[str, str] = {}
            _add_keyword(answer, name, _text_of(name, function()))
            fresh |= answer
        return make_dsn(**fresh)

    named = tuple(
        name
        for name in connect_kwargs
        if connect_kwargs[name] is not None and name not in python_kwargs
    )
    return ConnInfo(
        make_dsn(**merged),
        python_kwargs,
        ask if asked or callable(dsn) else None,
        named=named,
        based=bool(origin),
    )


def connect_directly(dsn: str, **keywords: object) -> connection:
    """Connect for a session of our own, without a wrapper of `psycopg2.connect` that traces it."""
    return connection(make_dsn(dsn, **keywords))


def _split_keywords(
    given: Mapping[str, Any],
) -> tuple[dict[str, str], dict[str, Any], dict[str, Callable[[], object]]]:
    """Check the keywords; divide them into libpq's, psycopg2's, and libpq's that are functions."""
    keywords: dict[str, str] = {}
    python_kwargs: dict[str, Any] = {}
    asked: dict[str, Callable[[], object]] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in ("async", "async_"):
            raise ConfigError(f"{name}= cannot be used: a pool needs blocking connections")
        if name == "connection_factory" and not (
            isinstance(value, type) and issubclass(value, connection)
        ):
            raise ConfigError(
                "connection_factory= must be a subclass of psycopg2.extensions.connection"
            )
        if name == "cursor_factory" and not callable(value):
            raise ConfigError("cursor_factory= must be a cursor class or another callable")
        if name in ("connection_factory", "cursor_factory"):
            python_kwargs[name] = value
        elif not callable(value):
            _add_keyword(keywords, name, str(value))
        elif name in _SERVER:
            raise ConfigError(
                f"{name}= cannot be a function, since processes find their broker by it;"
                " dsn= can be one"
            )
        elif name == "user":
            raise ConfigError(
                "user= cannot be a function, as it might not fit the password;"
                " dsn= can be one for both"
            )
        else:
            _add_keyword({}, name, "")
            asked[name] = value
    return keywords, python_kwargs, asked


def _text_of(name: str, answer: object) -> str:
    """Return what a function has returned, if it is text. Raise ConfigError for anything else.

    libpq would take the text of None for the password.
    """
    if not isinstance(answer, str):
        raise ConfigError(
            f"{name}= must be a function that returns a string, not {type(answer).__name__}"
        )
    return answer


def _add_keyword(keywords: dict[str, str], name: str, value: str) -> None:
    known = "dbname" if name == "database" else name
    # libpq is asked, since a list of ours would lag behind its versions.
    if not _KEYWORD.fullmatch(known) or isinstance(_try_parse(f"{known}=x"), str):
        raise ConfigError(
            f"{name}= is not a connection keyword of this libpq;"
            " see its list of parameter key words"
        )
    if _UNUSABLE.search(value):
        raise ConfigError(
            f"{name}= has a value that libpq cannot take (a NUL or an unpaired surrogate)"
        )
    if keywords.get(known, value) != value:
        raise ConfigError("database= and dbname= were both given and differ; pass one of them")
    keywords[known] = value


def _parse_url(origin: str, url: str) -> dict[str, str]:
    """Parse a URL. libpq decodes the percent signs and knows the query parameters."""
    if not isinstance(url, str):
        raise ConfigError(f"{origin} must be a string, not {type(url).__name__}")
    # Else a newline at the end of an env file would become part of the database's name.
    url = url.strip()
    if not url.startswith(_URL_PREFIXES):
        scheme = _SCHEME.match(url)
        found = f"has the scheme {scheme[1]}://" if scheme else "has no scheme"
        raise ConfigError(f"{origin} {found}; accepted are {' and '.join(_URL_PREFIXES)}")
    # libpq ends the password at its first @ or /, so the rest of it would appear in logs as host,
    # port or database. User and password are all before the first @, unless a / comes earlier.
    user, at, rest = url.partition("://")[2].partition("@")
    where = rest if at and "/" not in user else user + at + rest
    if "@" in where.partition("?")[0]:
        raise ConfigError(
            f"{origin} has a stray @ or /: percent-encode them in user and password (%40, %2F)"
        )
    return _parsed(origin, url)


def _parse_dsn(origin: str, dsn: str) -> dict[str, str]:
    """Parse a connection string, or like psycopg2 a URL."""
    if not isinstance(dsn, str):
        raise ConfigError(f"{origin} must be a string, not {type(dsn).__name__}")
    return _parse_url(origin, dsn) if _SCHEME.match(dsn.strip()) else _parsed(origin, dsn)


def _parsed(origin: str, text: str) -> dict[str, str]:
    found = _try_parse(text)
    # Not raised in the except clause: __context__ would keep libpq's message, which quotes the
    # input.
    if isinstance(found, str):
        raise ConfigError(f"{origin} cannot be parsed: {found}")
    return found


def _try_parse(text: str) -> dict[str, str] | str:
    """Return the parameters in `text`, or why there are none, without quoting the input."""
    if _UNUSABLE.search(text):  # psycopg2 would silently cut it at a NUL
        return "it contains a character that libpq cannot take (a NUL or an unpaired surrogate)"
    try:
        return parse_dsn(text)
    except psycopg2.Error as error:
        return _without_quotes(str(error))


def _without_quotes(message: str) -> str:
    """Remove what libpq quotes: parts of the input, even the password, which may contain quotes."""
    message = " ".join(re.sub(r'".*"', "...", message, flags=re.DOTALL).split())
    # A translated message may use other quotation marks, so it is left out.
    return (
        message.removeprefix("invalid dsn: ")
        if message.isascii() and '"' not in message
        else "libpq refuses it"
    )


def _resolve_by_libpq(dsn: str) -> dict[str, str] | None:
    """Return libpq's reading of `dsn` with its defaults, or None without access to libpq.

    PQconndefaults does not take `dsn`, and would need PGSERVICE set for a moment, which races with
    other threads. Instead a connect is started with an impossible sslmode. libpq fills in every
    option and refuses before it looks up a name or opens a socket (fe-connect.c, PQconnectStart).
    """
    lib = libpq.library()
    if lib is None:
        return None
    # With a password libpq does not read ~/.pgpass.
    text = make_dsn(dsn, sslmode=_REFUSED_SSLMODE, password="-").encode("utf-8", "surrogateescape")
    conn = lib.PQconnectStart(text)
    found = libpq.options(lib, conn)
    message = lib.PQerrorMessage(conn).decode("utf-8", "replace")
    lib.PQfinish(conn)
    if found is None:
        return None
    # The port has a built-in default. Without one, libpq has failed over the service.
    if "port" not in found:
        service = parse_dsn(dsn).get("service") or os.environ.get("PGSERVICE", "")
        raise ConfigError(
            f"service {service!r} (service= or PGSERVICE) cannot be used:"
            f" {_without_quotes(message)}"
        )
    return found


def _resolve_by_hand(given: Mapping[str, str]) -> dict[str, str]:
    """Resolve without libpq, as far as possible: a service's name stands for its host."""
    variables = {
        "host": "PGHOST",
        "hostaddr": "PGHOSTADDR",
        "port": "PGPORT",
        "dbname": "PGDATABASE",
        "user": "PGUSER",
    }
    found = {
        key: os.environ[variable] for key, variable in variables.items() if os.environ.get(variable)
    }
    if service := given.get("service") or os.environ.get("PGSERVICE"):
        found["host"] = f"service={service}"
    found.update((key, value) for key, value in given.items() if key in variables and value)
    if "user" not in found:
        try:
            found["user"] = pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:  # a uid without a name, as in a container
            found["user"] = str(os.geteuid())
    return found
