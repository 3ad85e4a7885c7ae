"""Where a broker listens, and the private directory for what belongs to it.

An address is a ZeroMQ endpoint: `ipc:///path/to.sock` (this host) or `tcp://host:port`.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
from pathlib import Path

from sharedpool.errors import ConfigError

BROKER_VARIABLE = "SHAREDPOOL_BROKER"
# sockaddr_un.sun_path, less its closing zero byte.
_MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107


def runtime_dir() -> Path:
    """Return the user's private directory for sockets and lock files, made when it is not there.

    `$XDG_RUNTIME_DIR/sharedpool`, else `sharedpool-<uid>` under the system's temporary directory. Raise `ConfigError`
    when it is a symlink, somebody else's, or open to others: whoever can write there could pose as the broker.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isabs(base) and os.path.isdir(base):
        path = Path(base, "sharedpool")
    else:
        path = Path(tempfile.gettempdir(), f"sharedpool-{os.getuid()}")
    return _private(path, "set XDG_RUNTIME_DIR to your own")


def fixed_dir() -> Path:
    """Return a private directory that no environment variable moves: `/tmp/sharedpool-<uid>`, checked as the other is.

    What a tcp broker knows lies here: its port is the same whatever XDG_RUNTIME_DIR and TMPDIR are at its next start.
    """
    return _private(Path("/tmp", f"sharedpool-{os.getuid()}"), "use an ipc:// address")


def _private(path: Path, otherwise: str) -> Path:
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"cannot make the runtime directory {path}: {error.strerror}; {otherwise}") from error
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"the runtime directory {path} is a symlink or no directory: remove it, or {otherwise}")
    if status.st_uid != os.getuid():
        raise ConfigError(f"the runtime directory {path} belongs to uid {status.st_uid}: {otherwise}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"the runtime directory {path} is open to others (mode {mode:o}): chmod 700 it")
    return path


def default_address() -> str:
    """Return where `sharedpool broker` listens when it is not told."""
    return check_address(f"ipc://{runtime_dir()}/broker.sock", "--bind")


def automatic_address(digest: str) -> str:
    """Return where the automatic broker of one server identity and pool listens."""
    return check_address(f"ipc://{runtime_dir()}/auto-{digest}.sock", "XDG_RUNTIME_DIR")


def check_address(address: str, source: str) -> str:
    """Return `address` when a broker could listen there; else raise `ConfigError` naming `source`."""
    if address.startswith("ipc://"):
        path = address[len("ipc://") :]
        if not path.startswith("/"):
            raise ConfigError(f"{source}: {address!r} needs an absolute path: ipc:///run/app/sharedpool.sock")
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            raise ConfigError(f"{source}: the socket path {path} is longer than {_MAX_SOCKET_PATH} bytes")
        return address
    match = re.fullmatch(r"tcp://(?P<host>\[[0-9a-fA-F:.]+\]|[^:/\[\]]+):(?P<port>\d+)", address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(f"{source}: {address!r} is no broker address: use ipc:///path/to.sock or tcp://host:port")
    return address


def check_metrics_address(text: str, source: str) -> tuple[str, int]:
    """Return host and port of `host:port`, `[::1]:port` or just a port (loopback); else raise `ConfigError`."""
    match = re.fullmatch(r"(?:(?P<host>\[[0-9a-fA-F:.]+\]|[^:/\[\]\s]*):)?(?P<port>\d{1,5})", text)
    if match is None or int(match["port"]) > 65535:
        raise ConfigError(f"{source}: {text!r} is no address to serve metrics at: use 127.0.0.1:9187")
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
