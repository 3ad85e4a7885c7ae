"""Where to connect: resolved once from arguments and environment, never logged with its password."""

import hashlib
import os
import pwd
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg2
from psycopg2.extensions import connection, make_dsn, parse_dsn

from sharedpool.errors import ConfigError
from sharedpool.postgres import libpq

_URL_PREFIXES = ("postgres://", "postgresql://")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_KEYWORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# Whoever names one of these has said where to connect; DATABASE_* then belongs to something else.
_LOCATION = frozenset({"host", "hostaddr", "port", "dbname", "user", "password", "service"})
_LOCATION_VARIABLES = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE")
# What tells one server and database from another: a function here would give each process a broker of its own.
_SERVER = frozenset({"host", "hostaddr", "port", "dbname", "database", "service"})
SECRET = re.compile(r"password|secret|scram_\w+_key")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_PORTS = re.compile(r"[0-9, ]*")
_REFUSED_SSLMODE = "resolve-only"


class ServerIdentity(NamedTuple):
    """One database as one role sees it, as libpq resolves it."""

    host: str
    port: str
    dbname: str
    user: str

    def digest(self) -> str:
        """Return 16 hex digits for the server and the role, safe in a file name: processes that agree share a broker.

        The database is not in it: one broker serves all databases of a server.
        """
        text = "\0".join((self.host, self.port, self.user))  # libpq's values cannot contain NUL
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}/{self.dbname}"


@dataclass(frozen=True, slots=True, repr=False)
class ConnInfo:
    """What `psycopg2.connect(current(), **python_kwargs)` needs; its repr hides secrets, its `dsn` does not.

    `dsn` is what was known when it was resolved. `ask`, if there is something that changes, returns what it is now.
    `named` are the keywords with which it was given, beside, if it is `based` on one, a conninfo string or a URL.
    """

    dsn: str
    python_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    ask: Callable[[], str] | None = None
    named: tuple[str, ...] = ()
    based: bool = True
    _known: dict[tuple[object, ...], ServerIdentity] = field(
        default_factory=dict, init=False, compare=False
    )

    def current(self) -> str:
        """Return the conninfo string for one connect.

        Calls what was given as a function, which may block. Raise what it raises, and `ConfigError` for what it returns
        if libpq cannot take it; neither names a secret unless the function's own error does.
        """
        return self.dsn if self.ask is None else self.ask()

    def arguments(self, current: str) -> tuple[str | None, dict[str, str]]:
        """Return psycopg2's arguments for `current`, the string as well as the keywords as they were given.

        Who wraps `psycopg2.connect` may look at either.
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
        """Return the server as libpq resolves it now: arguments, service file, `PG*` of this process, built-in values.

        Reads files (service file), never the network. Raises ConfigError for a service that libpq cannot find.
        """
        # By libpq it costs a tenth of a process's first checkout, which asks once more.
        source = (os.geteuid(), *map(os.environ.get, _LOCATION_VARIABLES))
        identity = self._known.get(source)
        if identity is None:
            identity = self._identity()
            self._known.clear()
            if not (
                os.environ.get("PGSERVICE") or "service" in parse_dsn(self.dsn)
            ):  # its file may change
                self._known[source] = identity
        return identity

    def _identity(self) -> ServerIdentity:
        found = _resolve_by_libpq(self.dsn) or _resolve_by_hand(parse_dsn(self.dsn))
        user = found.get("user") or ""
        # Where both are given libpq connects to hostaddr; host only names it.
        host = found.get("hostaddr") or found.get("host") or "local"
        return ServerIdentity(host, found.get("port") or "5432", found.get("dbname") or user, user)

    def __repr__(self) -> str:
        found = _try_parse(self.dsn)
        if isinstance(
            found, str
        ):  # not from resolve(); a repr must not raise, least of all with the input quoted
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

    Explicit arguments win over `DATABASE_DSN`, then `DATABASE_URL`, then libpq's own environment, which libpq reads
    itself when it connects. A keyword that says where (host, port, dbname, user, ...) sets `DATABASE_*` aside; others
    (sslmode, cursor_factory, ...) are laid over it. Raises ConfigError, which names the argument and never a secret.

    `dsn`, and the value of a keyword that does not say which server it is (password, sslkey, ...), may be a function
    without arguments, asked at every connect. That of `dsn` is called here, too: it names the server.
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
    # libpq would say so only when it connects; a URL without its @host has the password in this place.
    if not _PORTS.fullmatch(merged.get("port", "")):
        raise ConfigError(
            f"{'port=' if 'port' in keywords else origin} has a port that is not a number"
        )
    somewhere = base or located or any(environ.get(name) for name in _LOCATION_VARIABLES)
    if not somewhere:
        raise ConfigError(
            "nothing to connect to: pass dsn=, db_url= or keywords such as host= and dbname=, or set DATABASE_DSN,"
            f" DATABASE_URL or one of {', '.join(_LOCATION_VARIABLES)}"
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
    """Connect, past whatever wraps `psycopg2.connect`: a session of our own is no user's to trace."""
    return connection(make_dsn(dsn, **keywords))


def _split_keywords(
    given: Mapping[str, Any],
) -> tuple[dict[str, str], dict[str, Any], dict[str, Callable[[], object]]]:
    """Check the keywords; return libpq's (as text), psycopg2's own, and libpq's that are asked for at every connect."""
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
                f"{name}= cannot be a function: by it processes find their broker; dsn= can be one"
            )
        elif name == "user":
            raise ConfigError(
                "user= cannot be a function: it would not fit the password; dsn= can be one, for both"
            )
        else:
            _add_keyword({}, name, "")
            asked[name] = value
    return keywords, python_kwargs, asked


def _text_of(name: str, answer: object) -> str:
    """Return what a function returned, if it is text: of anything else, None for one, libpq would make a password."""
    if not isinstance(answer, str):
        raise ConfigError(
            f"{name}= must be a function that returns a string, not {type(answer).__name__}"
        )
    return answer


def _add_keyword(keywords: dict[str, str], name: str, value: str) -> None:
    known = "dbname" if name == "database" else name
    # A list of our own would lag behind libpq's versions, so libpq is asked.
    if not _KEYWORD.fullmatch(known) or isinstance(_try_parse(f"{known}=x"), str):
        raise ConfigError(
            f"{name}= is not a connection keyword of this libpq; see its list of parameter key words"
        )
    if _UNUSABLE.search(value):
        raise ConfigError(
            f"{name}= has a value that libpq cannot take (a NUL or an unpaired surrogate)"
        )
    if keywords.get(known, value) != value:
        raise ConfigError("database= and dbname= were both given and differ; pass one of them")
    keywords[known] = value


def _parse_url(origin: str, url: str) -> dict[str, str]:
    """Parse a URL; libpq percent-decodes its parts and keeps its query parameters."""
    if not isinstance(url, str):
        raise ConfigError(f"{origin} must be a string, not {type(url).__name__}")
    url = (
        url.strip()
    )  # the newline at the end of an env file would become part of the database's name
    if not url.startswith(_URL_PREFIXES):
        scheme = _SCHEME.match(url)
        found = f"has the scheme {scheme[1]}://" if scheme else "has no scheme"
        raise ConfigError(f"{origin} {found}; accepted are {' and '.join(_URL_PREFIXES)}")
    # libpq ends the password at its first @ or /: the rest would show up in logs as a host, port or database. What
    # stands before the first @, a ? as well, is user and password, unless there is a / before it.
    user, at, rest = url.partition("://")[2].partition("@")
    where = rest if at and "/" not in user else user + at + rest
    if "@" in where.partition("?")[0]:
        raise ConfigError(
            f"{origin} has a stray @ or /: percent-encode them in user and password (%40, %2F)"
        )
    return _parsed(origin, url)


def _parse_dsn(origin: str, dsn: str) -> dict[str, str]:
    """Parse a conninfo string; like psycopg2, take a URL as well."""
    if not isinstance(dsn, str):
        raise ConfigError(f"{origin} must be a string, not {type(dsn).__name__}")
    return _parse_url(origin, dsn) if _SCHEME.match(dsn.strip()) else _parsed(origin, dsn)


def _parsed(origin: str, text: str) -> dict[str, str]:
    found = _try_parse(text)
    # Raised here and not in the except clause: __context__ would keep libpq's message, which quotes the input.
    if isinstance(found, str):
        raise ConfigError(f"{origin} cannot be parsed: {found}")
    return found


def _try_parse(text: str) -> dict[str, str] | str:
    """Return the parameters in `text`, or the reason why there are none, without any piece of the input."""
    if _UNUSABLE.search(text):  # psycopg2 would cut the text at a NUL without a word
        return "it holds a character that libpq cannot take (a NUL or an unpaired surrogate)"
    try:
        return parse_dsn(text)
    except psycopg2.Error as error:
        return _without_quotes(str(error))


def _without_quotes(message: str) -> str:
    """Strip what libpq quotes: pieces of the input, the password among them, which may hold quotes of its own."""
    message = " ".join(re.sub(r'".*"', "...", message, flags=re.DOTALL).split())
    # A translated message may quote with other signs: say less rather than too much.
    return (
        message.removeprefix("invalid dsn: ")
        if message.isascii() and '"' not in message
        else "libpq refuses it"
    )


def _resolve_by_libpq(dsn: str) -> dict[str, str] | None:
    """Return libpq's own reading of `dsn` with its defaults, or None without access to libpq.

    PQconndefaults knows the environment but not `dsn`, and would need PGSERVICE set for a moment, which races with
    other threads. So a connection is started that libpq must refuse: it fills in every option, finds the sslmode
    impossible and stops before it looks up a name or opens a socket (fe-connect.c, PQconnectStart).
    """
    lib = libpq.library()
    if lib is None:
        return None
    # A password given here keeps libpq from reading ~/.pgpass.
    text = make_dsn(dsn, sslmode=_REFUSED_SSLMODE, password="-").encode("utf-8", "surrogateescape")
    conn = lib.PQconnectStart(text)
    found = libpq.options(lib, conn)
    message = lib.PQerrorMessage(conn).decode("utf-8", "replace")
    lib.PQfinish(conn)
    if found is None:
        return None
    # The port has a built-in value: without one libpq gave up before the defaults, over the service.
    if "port" not in found:
        service = parse_dsn(dsn).get("service") or os.environ.get("PGSERVICE", "")
        raise ConfigError(
            f"service {service!r} (service= or PGSERVICE) cannot be used: {_without_quotes(message)}"
        )
    return found


def _resolve_by_hand(given: Mapping[str, str]) -> dict[str, str]:
    """Do what libpq would, as far as that goes without it: a service keeps its name as the host."""
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
        except KeyError:  # a container's uid without a name
            found["user"] = str(os.geteuid())
    return found
