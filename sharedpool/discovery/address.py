"""Where a broker listens, and the private directory for what belongs to it.

An address is a ZeroMQ endpoint: `ipc:///path/to.sock` (this host) or `tcp://host:port`.
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
# sockaddr_un.sun_path, less its closing zero byte.
_MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
_told: set[str] = set()


def runtime_dir() -> Path:
    """Return the user's private directory for sockets and lock files, made when it is not there.

    `$XDG_RUNTIME_DIR/sharedpool`, else `sharedpool-<uid>` under the temporary directory: where the variable is not set,
    or is another user's (as after `su` and `sudo -E`), for whom a directory of ours there would be in the way. Raise
    `ConfigError` when it cannot be had, is a symlink, somebody else's, or open to others: whoever can write there could
    pose as the broker.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isabs(base):
        path = Path(base, "sharedpool")
        hindrance = _hindrance(base, path.name, shared=False) or _owner_hindrance(path)
        if not hindrance:
            return _private(path, "set XDG_RUNTIME_DIR to your own")
        _tell_once(f"XDG_RUNTIME_DIR is not used: {hindrance}")
    return _private(_temporary(f"sharedpool-{os.geteuid()}"), "set XDG_RUNTIME_DIR to your own")


def fixed_dir() -> Path:
    """Return a private directory that no environment variable moves: `/tmp/sharedpool-<uid>`, checked as the other is.

    What a tcp broker knows lies here: its port is the same whatever XDG_RUNTIME_DIR and TMPDIR are at its next start.
    """
    return _private(Path("/tmp", f"sharedpool-{os.geteuid()}"), "use an ipc:// address")


def _private(path: Path, otherwise: str) -> Path:
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(
            f"cannot make the runtime directory {path}: {error.strerror}; {otherwise}"
        ) from error
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(
            f"the runtime directory {path} is a symlink or no directory: remove it, or {otherwise}"
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
    """Return `name` in the temporary directory, which is the same one whatever becomes of it: full, or out of quota.

    (`tempfile.gettempdir` tries to write, and takes the current directory in the end: processes would not meet.)
    """
    hindrances = []
    for base in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp"):
        if base and os.path.isabs(base):
            if not (hindrance := _hindrance(base, name, shared=True)):
                return Path(base, name)
            hindrances.append(hindrance)
    raise ConfigError(
        f"there is no directory for the broker's socket: {', '.join(hindrances)}. Set XDG_RUNTIME_DIR or TMPDIR to one"
        " that this user may write to, or start `sharedpool broker` elsewhere and give its address to"
        f" config_pool(broker=) or {BROKER_VARIABLE}"
    )


def _hindrance(base: str, name: str, *, shared: bool) -> str:
    """Return why this user cannot have the directory `name` in `base`, which may be `shared`; nothing where he can."""
    try:
        status = os.stat(base)
    except OSError as error:
        return f"{base}: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{base} is no directory"
    if status.st_uid not in (os.geteuid(), 0) and not (shared and status.st_mode & stat.S_IWOTH):
        return f"{base} belongs to uid {status.st_uid}"
    if not _may(base, os.X_OK) or not (
        os.path.isdir(os.path.join(base, name)) or _may(base, os.W_OK)
    ):
        return f"{base} cannot be written to by uid {os.geteuid()}"
    return ""


def _owner_hindrance(path: Path) -> str:
    """Return that somebody else has made a directory where ours would be (root, as long as it had our environment)."""
    try:
        owner = path.lstat().st_uid
    except OSError:
        return ""  # it will be made, or that will say why not
    return f"{path} belongs to uid {owner}" if owner != os.geteuid() else ""


def _may(path: str, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _tell_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        logger.info("%s", text)


def default_address() -> str:
    """Return where `sharedpool broker` listens when it is not told."""
    return check_address(f"ipc://{runtime_dir()}/broker.sock", "--bind")


def automatic_address(digest: str) -> str:
    """Return where the automatic broker of one server and role listens."""
    return check_address(f"ipc://{runtime_dir()}/auto-{digest}.sock", "XDG_RUNTIME_DIR")


def check_address(address: str, source: str) -> str:
    """Return `address` when a broker could listen there; else raise `ConfigError` naming `source`."""
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
            f"{source}: {address!r} is no broker address: use ipc:///path/to.sock or tcp://host:port"
        )
    return address


def check_metrics_address(text: str, source: str) -> tuple[str, int]:
    """Return host and port of `host:port`, `[::1]:port` or just a port (loopback); else raise `ConfigError`."""
    match = re.fullmatch(r"(?:(?P<host>\[[0-9a-fA-F:.]+\]|[^:/\[\]\s]*):)?(?P<port>\d{1,5})", text)
    if match is None or int(match["port"]) > 65535:
        raise ConfigError(
            f"{source}: {text!r} is no address to serve metrics at: use 127.0.0.1:9187"
        )
    return (match["host"] or "127.0.0.1").strip("[]"), int(match["port"])


def obstacle(address: str) -> str:
    """Say what keeps this process from the socket at an ipc address; empty when the file system does not."""
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
            return f"{each} is uid {owner}'s, who lets nobody else in, and this process is uid {os.geteuid()}"
    return ""


def lock_path(address: str) -> Path:
    """Return the lock file of the broker at `address`: beside its socket, or in `fixed_dir` for tcp."""
    return _beside(address, ".lock")


def journal_path(address: str) -> Path:
    """Return where the broker at `address` keeps its journal."""
    return _beside(address, ".journal")


def desk_path(address: str) -> Path | None:
    """Return where the broker at `address` has its desk; None where the path would be too long for a socket."""
    path = _beside(address, ".desk")
    return path if len(os.fsencode(path)) <= _MAX_SOCKET_PATH else None


def _beside(address: str, suffix: str) -> Path:
    if address.startswith("ipc://"):
        return Path(address[len("ipc://") :] + suffix)
    return fixed_dir() / (re.sub(r"[^0-9A-Za-z.]+", "-", address) + suffix)
