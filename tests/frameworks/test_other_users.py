"""Started as root, working as somebody else; in another user's environment; without a directory.

Needs root.
"""

import itertools
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.frameworks.celery_files import through_files
from tests.frameworks.web_servers import HERE, load, serving
from tests.support import automatic_broker
from tests.support.processes import LONG, BackendSampler

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root may become somebody else: run as root"
)
PACKAGES = [
    str(Path(sharedpool.__file__).parents[1]),
    *(path for path in sys.path if path.endswith("-packages")),
]
LIMIT = 3


class Account(NamedTuple):
    """Who is to do the work, by which Python, and where all users may write."""

    name: str
    group: str
    uid: int
    gid: int
    python: str
    folder: Path

    @property
    def runtime_dir(self) -> Path:
        """The directory of that user's brokers, if XDG_RUNTIME_DIR belongs to somebody else."""
        return self.folder / f"sharedpool-{self.uid}"

    def run(self, code: str, *arguments: str, **environment: str) -> str:
        """Run `code` as that user; return what it printed."""
        command = [self.python, "-c", code, *arguments]
        outcome = subprocess.run(
            command,
            user=self.uid,
            group=self.gid,
            extra_groups=[],
            env=os.environ | environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return outcome.stdout.strip() or outcome.stderr.strip()


@pytest.fixture(scope="module")
def server() -> Iterator[EphemeralPostgres]:
    """PostgreSQL by tcp: its socket is for one user."""
    with EphemeralPostgres(max_connections=50, tcp=True) as server:
        yield server


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    """An account without rights; in the end its brokers, and root's, must be unused."""
    found = pwd.getpwnam("nobody")
    folder = Path(tempfile.mkdtemp(prefix="spu-", dir="/tmp"))
    folder.chmod(0o1777)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(PACKAGES))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    group = subprocess.run(
        ["id", "-gn", "nobody"], capture_output=True, text=True, check=True
    ).stdout.strip()
    python = python_for_all()
    account = Account("nobody", group, found.pw_uid, found.pw_gid, python or "", folder)
    if (
        python is None
        or (said := account.run("import celery, gunicorn, sharedpool; print('can')")) != "can"
    ):
        shutil.rmtree(folder)
        pytest.skip(
            "no Python here that the account nobody can run with our packages: "
            f"{said if python else ''}"
        )
    with (
        automatic_broker.seen_off(account.runtime_dir),
        automatic_broker.seen_off(folder / "sharedpool-0"),
    ):
        yield account
    shutil.rmtree(folder)


def python_for_all() -> str | None:
    """This Python, if everybody may run it; else the machine's, in the same version."""
    path = Path(os.path.realpath(sys.executable))
    if all(part.stat().st_mode & 0o001 for part in (path, *path.parents)):
        return sys.executable
    return shutil.which(f"python{sys.version_info.major}.{sys.version_info.minor}", path=os.defpath)


@contextmanager
def runtime_dir_of(uid: int, mode: int = 0o700) -> Iterator[Path]:
    """A user's XDG_RUNTIME_DIR, as a login makes it."""
    path = Path(tempfile.mkdtemp(prefix="spx-", dir="/tmp"))
    os.chown(path, uid, -1)
    path.chmod(mode)
    yield path
    shutil.rmtree(path)


# Half of the eight have every two of the three together and apart.
WAYS = [each for each in itertools.product([False, True], repeat=3) if LONG or sum(each) % 2 == 0]


@pytest.mark.long_variants
@pytest.mark.parametrize(("preload", "xdg", "used"), WAYS)
def test_gunicorn_that_gives_up_root_shares_the_limit(
    account: Account,
    server: EphemeralPostgres,
    tmp_path: Path,
    preload: bool,
    xdg: bool,
    used: bool,
) -> None:
    """With root's XDG_RUNTIME_DIR or without, and the pool used while the application is loaded or
    not."""
    options = ["--preload"] if preload else []
    environment = {"TARGET_POOL": "as nobody", "DATABASE_DSN": server.dsn}
    if used:
        environment["TARGET_AT_IMPORT"] = "1"
    command = [account.python, "-m", "gunicorn", "--bind", "fd://{fd}", "-w", "4", *options]
    command += ["--user", account.name, "--group", account.group, "wsgi_target:app"]
    with (
        runtime_dir_of(0) as roots,
        BackendSampler(server.dsn, "sharedpool as nobody [%") as sampler,
    ):
        if xdg:
            environment["XDG_RUNTIME_DIR"] = str(roots)
        with (
            automatic_broker.seen_off(roots / "sharedpool"),
            serving(command, tmp_path / "log", environment) as served,
        ):
            answers = load(served, 60)
            assert served.stop() == 0
            assert "Traceback" not in served.words()
    assert {answer["uid"] for answer in answers} == {account.uid}
    # What root has connected while it loaded the application is root's, in a broker of its own.
    assert 1 <= sampler.peak <= LIMIT + used


@pytest.mark.long
def test_celery_that_gives_up_root_does_its_tasks(
    account: Account, server: EphemeralPostgres
) -> None:
    ends = account.folder / "ends"
    ends.mkdir()
    ends.chmod(0o777)
    environment = os.environ | {
        "TARGET_POOL": "as nobody", "DATABASE_DSN": server.dsn, "TARGET_SIGNALS": "1",
        "TARGET_CELERY": json.dumps(through_files(account.folder)), "TARGET_ENDS": str(ends),
    }  # fmt: skip
    ask = "from celery_target import look\nsent = [look.delay(0.01) for _ in range(8)]\n"
    ask += "print('sent', flush=True)\nprint(len([each.get(timeout=50) for each in sent]))"
    asked = subprocess.Popen(
        [account.python, "-c", ask], cwd=HERE, env=environment, stdout=subprocess.PIPE, text=True,
        user=account.uid, group=account.gid, extra_groups=[],
    )  # fmt: skip
    assert asked.stdout is not None
    assert asked.stdout.readline() == "sent\n"  # a worker that finds a message half written ends
    command = [
        account.python,
        "-m",
        "celery",
        "-A",
        "celery_target",
        "worker",
        "-c",
        "2",
        "-l",
        "INFO",
    ]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    command += ["--uid", str(account.uid), "--gid", str(account.gid)]
    with (account.folder / "log").open("w") as log:
        worker = subprocess.Popen(
            command, cwd=HERE, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        assert asked.communicate(timeout=60)[0] == "8\n"
        worker.terminate()
        assert worker.wait(30) == 0
    finally:
        print((account.folder / "log").read_text()[-5000:])  # pytest shows it when the test fails
        asked.kill()
        asked.wait()
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    assert list(account.runtime_dir.glob("*.log")), "the broker was not the tasks' user's"


GIVE_UP_ROOT = """
import os, sys
import sharedpool
pool = sharedpool.config_pool(max_conn=1, timeout=10, dsn=sys.argv[1])
uid, gid, how = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if how == "used before":
    pool.put_conn(pool.get_conn())
if how == "a child":
    if os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
os.setgroups([])
if how == "for the moment":
    os.setegid(gid)
    os.seteuid(uid)
else:
    os.setgid(gid)
    os.setuid(uid)
with pool.connection() as conn, conn.cursor() as cursor:
    cursor.execute("SELECT 'works'")
    print(cursor.fetchone()[0], flush=True)
"""


@pytest.mark.long_variants
@pytest.mark.parametrize("how", ["not used before", "used before", "a child", "for the moment"])
def test_a_program_may_give_up_root_after_config_pool(
    account: Account, server: EphemeralPostgres, how: str
) -> None:
    command = [
        account.python,
        "-c",
        GIVE_UP_ROOT,
        server.dsn,
        str(account.uid),
        str(account.gid),
        how,
    ]
    outcome = subprocess.run(
        command, cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    assert (outcome.stdout, outcome.stderr) == ("works\n", "")


CONNECT = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
import sharedpool
pool = sharedpool.config_pool(max_conn=1, timeout=10, dsn=sys.argv[1])
with pool.connection() as conn:
    print("works")
"""


def test_root_in_a_users_environment_leaves_the_users_directory_alone(
    account: Account, server: EphemeralPostgres
) -> None:
    """As by `sudo -E`: files of root would lock the user out for ever."""
    with runtime_dir_of(account.uid) as theirs, automatic_broker.seen_off(theirs / "sharedpool"):
        environment = os.environ | {"XDG_RUNTIME_DIR": str(theirs)}
        command = [account.python, "-c", CONNECT, server.dsn]
        said = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout
        assert said.splitlines() == [
            f"XDG_RUNTIME_DIR is not used: {theirs} belongs to uid {account.uid}",
            "works",
        ]
        assert list(theirs.iterdir()) == []
        assert account.run(CONNECT, server.dsn, XDG_RUNTIME_DIR=str(theirs)) == "works"
        assert list((theirs / "sharedpool").glob("*.log"))


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_user_in_roots_environment_uses_a_private_directory(
    account: Account, server: EphemeralPostgres, mode: int
) -> None:
    """As by `su`."""
    with runtime_dir_of(0, mode) as roots:
        said = account.run(CONNECT, server.dsn, XDG_RUNTIME_DIR=str(roots)).splitlines()
        assert said[-1] == "works"
        assert said[0].startswith(
            f"XDG_RUNTIME_DIR is not used: {roots} cannot be written to by uid {account.uid}"
        )
        assert list(roots.iterdir()) == []


# --- no directory that can be written to

READ_ONLY = """
mount --make-rprivate / && mkdir -p /var/tmp || exit 77
for place in /tmp /var/tmp; do
    mount --bind $place $place && mount -o remount,bind,ro $place || exit 77
done
exec "$@"
"""


def read_only(account: Account, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as the account, in a mount namespace of its own where it can write nowhere."""
    if not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("no unshare or setpriv (util-linux)")
    as_nobody = ["setpriv", f"--reuid={account.uid}", f"--regid={account.gid}", "--clear-groups"]
    outcome = subprocess.run(
        ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", *as_nobody, *command],
        cwd="/", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if outcome.returncode == 77:
        pytest.skip(f"no mount namespace to be had: {outcome.stderr}")
    return outcome


@pytest.mark.parametrize("made", [False, True], ids=["no directory", "a directory of before"])
def test_without_a_writable_directory_the_error_says_what_to_set(
    account: Account, server: EphemeralPostgres, made: bool
) -> None:
    if made:
        account.runtime_dir.mkdir(mode=0o700)
        os.chown(account.runtime_dir, account.uid, account.gid)
    code = "import sharedpool\ntry:\n"
    code += f"  sharedpool.config_pool(dsn={server.dsn!r}).get_conn(timeout=5)\n"
    code += "except sharedpool.PoolError as error: print(error)"
    said = read_only(account, account.python, "-c", code).stdout
    for each in (
        "config_pool(broker=)",
        "SHAREDPOOL_BROKER",
        "XDG_RUNTIME_DIR",
        "TMPDIR",
        "sharedpool broker",
    ):
        assert each in said
    shown = read_only(account, account.python, "-m", "sharedpool", "status")
    assert "Traceback" not in shown.stderr
    places = [Path(base, account.runtime_dir.name) for base in (account.folder, "/tmp", "/var/tmp")]
    if (
        place := next((each for each in places if each.is_dir()), None)
    ) is not None:  # another test may have left one
        assert (shown.returncode, shown.stderr) == (3, f"no broker is running in {place}\n")
    else:
        assert shown.returncode == 2
        assert "Set XDG_RUNTIME_DIR or TMPDIR" in shown.stderr


def test_a_worker_that_is_given_a_broker_needs_no_writable_directory(
    account: Account, server: EphemeralPostgres
) -> None:
    place = account.folder / "own"
    place.mkdir(mode=0o700)
    os.chown(place, account.uid, account.gid)
    address = f"ipc://{place}/broker.sock"
    command = [
        account.python,
        "-m",
        "sharedpool",
        "broker",
        "--bind",
        address,
        "--max-conn",
        "1",
        "--dsn",
        server.dsn,
    ]
    broker = subprocess.Popen(
        command, user=account.uid, group=account.gid, extra_groups=[], cwd="/", stderr=-1
    )
    with broker:
        assert broker.stderr is not None
        assert broker.stderr.readline()
        options = f"dsn={server.dsn!r}, broker={address!r}"
        code = f"import sharedpool\npool = sharedpool.config_pool(1, {options})\n"
        code += "with pool.connection(timeout=10) as conn: print('works')"
        outcome = read_only(account, account.python, "-c", code)
        broker.terminate()
    assert (outcome.stdout, outcome.stderr) == ("works\n", "")
