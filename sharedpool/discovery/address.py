"""The addresses of brokers, and the private directories of their files.

An address is a ZeroMQ endpoint: `ipc:///path/to.sock`, or `tcp://127.0.0.1:port`:
both are on this host.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
from pathlib import Path

from sharedpool.errors import ConfigError

logger = logging.getLogger("sharedpool.worker")

BROKER_VARIABLE = "SHAREDPOOL_BROKER"
# The size of sockaddr_un.sun_path without its closing zero byte.
_MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
_logged: set[str] = set()


def runtime_dir() -> Path:
    """Return the user's private directory for sockets and lock files. Create it if necessary.

    1. `$XDG_RUNTIME_DIR/sharedpool`, unless XDG_RUNTIME_DIR is another user's, as after `su` and
       `sudo -E`: a directory of ours there would block that user's own.
    2. `sharedpool-<uid>` in the temporary directory.

    Raise `ConfigError` if it cannot be created, or is a symlink, another user's, or open to others.
    A process that can write there could pose as the broker.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isabs(base):
        path = Path(base, "sharedpool")
        obstacle = _base_obstacle(base, path.name, shared=False) or _owner_obstacle(path)
        if not obstacle:
            return _private(path, "set XDG_RUNTIME_DIR to your own")
        _log_once(f"XDG_RUNTIME_DIR is not used: {obstacle}")
    return _private(_temporary(f"sharedpool-{os.geteuid()}"), "set XDG_RUNTIME_DIR to your own")


def fixed_dir() -> Path:
    """Return the private directory for a tcp broker's files: `/tmp/sharedpool-<uid>`.

    No environment variable moves it. A tcp broker has the same port at its next start, and must
    find its files then, whatever XDG_RUNTIME_DIR and TMPDIR are.
    """
    return _private(Path("/tmp", f"sharedpool-{os.geteuid()}"), "use an ipc:// address")


def _private(path: Path, otherwise: str) -> Path:
    """Create the directory, or check it. `otherwise` is what a user can do instead."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(
            f"cannot create the runtime directory {path}: {error.strerror}; {otherwise}"
        ) from error
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(
            f"the runtime directory {path} is a symlink or a file: remove it, or {otherwise}"
        )
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"the runtime directory {path} belongs to uid {status.st_uid}: {otherwise}"
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(
            f"the runtime directory {path} is open to others (mode {mode:o}): chmod 700 it"
        )
    return path


def _temporary(name: str) -> Path:
    """Return the path of `name` in the temporary directory.

    All processes must agree on that directory, even when it is full. So this does not try to write,
    as `tempfile.gettempdir` does, which falls back to the current directory.
    """
    obstacles = []
    for base in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp"):
        if base and os.path.isabs(base):
            if not (obstacle := _base_obstacle(base, name, shared=True)):
                return Path(base, name)
            obstacles.append(obstacle)
    raise ConfigError(
        f"there is no directory for the broker's socket: {', '.join(obstacles)}."
        " Set XDG_RUNTIME_DIR or TMPDIR to a directory that this user may write to, or start"
        " `sharedpool broker` elsewhere and give its address to config_pool(broker=) or"
        f" {BROKER_VARIABLE}"
    )


def _base_obstacle(base: str, name: str, *, shared: bool) -> str:
    """Return why this user cannot have a directory `name` in `base`; empty if nothing is wrong.

    `shared`: `base` may belong to another user if all users may write to it.
    """
    try:
        status = os.stat(base)
    except OSError as error:
        return f"{base}: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{base} is not a directory"
    if status.st_uid not in (os.geteuid(), 0) and not (shared and status.st_mode & stat.S_IWOTH):
        return f"{base} belongs to uid {status.st_uid}"
    if not _may(base, os.X_OK) or not (
        os.path.isdir(os.path.join(base, name)) or _may(base, os.W_OK)
    ):
        return f"{base} cannot be written to by uid {os.geteuid()}"
    return ""


def _owner_obstacle(path: Path) -> str:
    """Return that the path is another user's; empty if not.

    Root may have created it, while it had this user's environment.
    """
    try:
        owner = path.lstat().st_uid
    except OSError:
        return ""  # `_private` will create it, or raise
    return f"{path} belongs to uid {owner}" if owner != os.geteuid() else ""


def _may(path: str, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _log_once(text: str) -> None:
    if text not in _logged:
        _logged.add(text)
        logger.info("%s", text)


def default_address() -> str:
    """Return the address of `sharedpool broker` without --bind."""
    return check_address(f"ipc://{runtime_dir()}/broker.sock", "--bind")


def automatic_address(digest: str) -> str:
    """Return the address of the automatic broker for one server and role."""
    return check_address(f"ipc://{runtime_dir()}/auto-{digest}.sock", "XDG_RUNTIME_DIR")


def check_address(address: str, source: str) -> str:
    """Return `address`. Raise `ConfigError`, naming `source`, if no broker could listen there."""
    if address.startswith("ipc://"):
        path = address[len("ipc://") :]
        if not path.startswith("/"):
            raise ConfigError(
                f"{source}: {address!r} needs an absolute path: ipc:///run/app/sharedpool.sock"
            )
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            raise ConfigError(
                f"{source}: the socket path {path} is longer than {_MAX_SOCKET_PATH} bytes"
            )
        return address
    match = re.fullmatch(r"tcp://(?P<host>\[[0-9a-fA-F:.]+\]|[^:/\[\]]+):(?P<port>\d+)", address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(
            f"{source}: {address!r} is not a broker's address:"
            " use ipc:///path/to.sock or tcp://127.0.0.1:port"
        )
    if not is_loopback(match["host"].strip("[]")):
        raise ConfigError(
            f"{source}: {address!r} can be reached from other hosts, and has no encryption and no"
            " authentication. Run a broker on each host instead: they share one limit by PostgreSQL"
            " itself. Use ipc:///path/to.sock or tcp://127.0.0.1:port"
        )
    return address


def is_loopback(host: str) -> bool:
    """Return True if only this host can reach a broker that listens there."""
    import ipaddress  # 0.3 MB that hardly any worker needs

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_metrics_address(text: str, source: str) -> tuple[str, int]:
    """Return host and port of `host:port`, `[::1]:port` or `port` (loopback).

    Raise `ConfigError`, naming `source`, for anything else.
    """
    match = re.fullmatch(r"(?:(?P<host>\[[0-9a-fA-F:.]+\]|[^:/\[\]\s]*):)?(?P<port>\d{1,5})", text)
    if match is None or int(match["port"]) > 65535:
        raise ConfigError(f"{source}: {text!r} is not an address for metrics: use 127.0.0.1:9187")
    return (match["host"] or "127.0.0.1").strip("[]"), int(match["port"])


def obstacle(address: str) -> str:
    """Return why the file system bars this process from an ipc address; empty if it does not."""
    if not address.startswith("ipc://"):
        return ""
    path = Path(address.removeprefix("ipc://"))
    for each in [*reversed(path.parents), path]:
        needed = os.W_OK if each == path else os.X_OK
        try:
            owner = each.stat().st_uid
        except FileNotFoundError:
            return f"there is no {each}"
        except OSError as error:
            return f"{each}: {error.strerror}"
        if not os.access(each, needed, effective_ids=os.access in os.supports_effective_ids):
            return (
                f"{each} belongs to uid {owner} and is closed to others, such as this process"
                f" (uid {os.geteuid()})"
            )
    return ""


def lock_path(address: str) -> Path:
    """Return the path of the broker's lock file: beside its socket, or in `fixed_dir` for tcp."""
    return _beside(address, ".lock")


def journal_path(address: str) -> Path:
    """Return the path of the broker's journal."""
    return _beside(address, ".journal")


def desk_path(address: str) -> Path | None:
    """Return the path of the broker's desk socket; None if it is too long for a socket."""
    path = _beside(address, ".desk")
    return path if len(os.fsencode(path)) <= _MAX_SOCKET_PATH else None


def _beside(address: str, suffix: str) -> Path:
    if address.startswith("ipc://"):
        return Path(address[len("ipc://") :] + suffix)
    return fixed_dir() / (re.sub(r"[^0-9A-Za-z.]+", "-", address) + suffix)
