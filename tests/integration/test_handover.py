"""A live connection moves from one process to another: its next user sees a plain connection, and
nothing else."""

import contextlib
import hashlib
import io
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extras
import pytest
from psycopg2 import extensions

import sharedpool
from sharedpool import ThreadedConnectionPool
from sharedpool.broker_location import GivenBroker
from sharedpool.descriptors.owned import Owned
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.desk import Live
from sharedpool.wire.values import Token
from sharedpool.worker.connection.handover import SUPPORTED, adopt
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.stub_server import StubServer
from sharedpool.worker.local_pool import LocalPool
from tests.support.pool_pair import MakePair, leave_what_comes, moved, report
from tests.support.processes import BackendSampler, Piped, Worker, run_python, workers
from tests.support.running_query import Query
from tests.support.sql import ask
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not SUPPORTED, reason="connections cannot be handed over on this platform"
)

# Read before the tests hide the environment from themselves.
_MOVES = int(os.environ.get("SHAREDPOOL_MOVES", "3000"))


def test_it_is_the_same_backend_and_a_plain_connection(
    pair: MakePair, broker: sharedpool.Broker, name: str, postgres: EphemeralPostgres
) -> None:
    a, b = pair()
    conn = moved(a, b, lambda conn: None)
    assert isinstance(conn, extensions.connection)
    assert conn.get_backend_pid() == conn.info.backend_pid == ask(conn, "SELECT pg_backend_pid()")
    assert conn.info.transaction_status == extensions.TRANSACTION_STATUS_INTRANS
    conn.rollback()
    assert (conn.status, conn.closed, conn.autocommit) == (extensions.STATUS_READY, 0, False)
    assert conn.server_version == conn.info.server_version > 100000
    assert conn.encoding == "UTF8"
    b.put_conn(conn)
    assert report(broker, name).handovers > 0
    assert (
        b.stats().connects == 0
        or a.stats().connects == 0
        or b.stats().connects + a.stats().connects <= 2
    )


def test_nothing_of_one_users_session_reaches_the_next(pair: MakePair) -> None:
    a, b = pair()

    def use(conn: extensions.connection) -> None:
        conn.autocommit = True
        conn.cursor_factory = psycopg2.extras.DictCursor
        with conn.cursor() as cursor:
            cursor.execute(
                "SET search_path TO nowhere; SET TIME ZONE 'Asia/Tokyo'; SET application_name TO "
                "'mine'"
            )
            cursor.execute(
                "CREATE TEMP TABLE left_over (n int); PREPARE mine AS SELECT 1; SELECT "
                "pg_advisory_lock(42)"
            )
            cursor.execute("LISTEN news; NOTIFY news; DO $$ BEGIN RAISE NOTICE 'said'; END $$")
        psycopg2.extras.register_default_json(conn, loads=lambda text: "the giver's")
        conn.commit()

    conn = moved(a, b, use)
    assert not conn.autocommit
    assert conn.cursor_factory is None
    assert (conn.notices, conn.notifies) == ([], [])
    assert ask(conn, "SHOW search_path") == '"$user", public'
    assert ask(conn, "SHOW TimeZone") == conn.get_parameter_status("TimeZone") != "Asia/Tokyo"
    assert (
        ask(conn, "SHOW application_name")
        == conn.get_parameter_status("application_name")
        != "mine"
    )
    assert ask(conn, "SELECT to_regclass('left_over')") is None
    assert ask(conn, "SELECT count(*) FROM pg_prepared_statements") == 0
    assert (
        ask(
            conn,
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
        )
        == 0
    )
    assert ask(conn, "SELECT count(*) FROM pg_listening_channels()") == 0
    assert ask(conn, """SELECT '{"a": 1}'::json""") == {"a": 1}


_SIGPIPE = """
import signal, sys
import psycopg2
from sharedpool.descriptors.readable import readable
from sharedpool.worker.connection import reset

signal.signal(signal.SIGPIPE, signal.SIG_DFL)
conn, other = (psycopg2.connect(sys.argv[1]) for _ in range(2))
other.cursor().execute("SELECT pg_terminate_backend(%s, 5000)", [conn.info.backend_pid])
readable([conn], 5)
print(reset.send(conn.fileno(), b"DISCARD ALL"))
"""


def test_a_program_that_does_not_ignore_sigpipe_outlives_a_backend_that_is_reset(
    postgres: EphemeralPostgres,
) -> None:
    command = [sys.executable, "-c", _SIGPIPE, postgres.dsn]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


@pytest.mark.parametrize(("length", "moves"), [(1500, True), (4000, False)])
def test_a_connection_with_too_much_to_say_of_itself_is_closed_instead(
    pair: MakePair, postgres: EphemeralPostgres, length: int, moves: bool
) -> None:
    a, b = pair(dsn=f"{postgres.dsn} options='-c search_path={'x' * length}'")
    before = b.stats()
    a.put_conn(a.get_conn())
    assert ask(b.get_conn(), "SELECT length(current_setting('search_path'))") == length
    after = b.stats()
    assert (after.adopted - before.adopted, after.connects - before.connects) == (
        int(moves),
        int(not moves),
    )


@pytest.mark.parametrize("end", ["nothing", "an error", "COMMIT as SQL"])
def test_no_half_transaction_is_committed(
    pair: MakePair, end: str, database: str, broker: sharedpool.Broker
) -> None:
    a, b = pair()
    conn = a.get_conn()
    ask(conn, "CREATE TABLE IF NOT EXISTS halves (n int); SELECT 1")
    conn.commit()
    a.put_conn(conn)

    def use(conn: extensions.connection) -> None:
        conn.cursor().execute("INSERT INTO halves VALUES (1)")
        if end == "an error":
            with pytest.raises(psycopg2.Error):
                conn.cursor().execute("SELECT 1/0")
        elif end == "COMMIT as SQL":
            conn.cursor().execute("ROLLBACK")

    conn = moved(a, b, use)
    assert conn.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE
    assert ask(conn, "SELECT count(*) FROM halves") == 0
    conn.cursor().execute("INSERT INTO halves VALUES (2)")
    conn.rollback()
    assert ask(conn, "SELECT count(*) FROM halves") == 0
    ask(conn, "DROP TABLE halves; SELECT 1")
    conn.commit()


def test_everything_that_a_connection_does_works_after_a_move(pair: MakePair) -> None:
    a, b = pair()
    conn = moved(a, b, lambda conn: None)
    with conn.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE rows (n int, t text)")
        cursor.copy_expert("COPY rows FROM STDIN", io.StringIO("1\tä€\n2\tb\n"))
        out = io.StringIO()
        cursor.copy_expert("COPY (SELECT * FROM rows ORDER BY n) TO STDOUT", out)
        assert out.getvalue() == "1\tä€\n2\tb\n"
        cursor.execute("SELECT repeat('x', 10000000)")
        assert cursor.fetchone() == ("x" * 10_000_000,)
    with conn.cursor("named") as named:
        named.execute("SELECT * FROM generate_series(1, 5000)")
        assert sum(n for (n,) in named) == 12502500
    large = conn.lobject(0, "wb")
    large.write(b"bytes")
    large.unlink()
    conn.commit()
    conn.autocommit = True
    with conn.cursor() as cursor:
        cursor.execute("LISTEN here; NOTIFY here, 'word'; DO $$ BEGIN RAISE NOTICE 'said'; END $$")
    assert [n.payload for n in conn.notifies] == ["word"]
    assert "said" in conn.notices[-1]
    assert conn.notifies[0].pid == conn.info.backend_pid
    conn.autocommit = False
    with pytest.raises(psycopg2.errors.DivisionByZero):
        ask(conn, "SELECT 1/0")
    conn.rollback()
    conn.set_client_encoding("LATIN1")
    assert ask(conn, "SELECT %s", "ä") == "ä"
    conn.rollback()
    conn.set_session(readonly=True, isolation_level="SERIALIZABLE")
    assert ask(conn, "SHOW transaction_isolation") == "serializable"
    b.put_conn(conn)
    assert ask(b.get_conn(), "SHOW transaction_isolation") == "read committed"


def test_a_connection_whose_encoding_has_changed_does_not_move(pair: MakePair) -> None:
    """psycopg2 chose its codec by it, and here it is not what was reset."""
    a, b = pair(reset="rollback")
    conn = a.get_conn()
    pid = conn.info.backend_pid
    conn.cursor().execute("SET client_encoding TO 'LATIN1'")
    conn.commit()
    a.put_conn(conn)
    got = b.get_conn()
    assert got.info.backend_pid != pid
    assert (got.encoding, ask(got, "SELECT %s", "ä")) == ("UTF8", "ä")


def test_a_query_of_a_connection_that_has_moved_can_be_cancelled(pair: MakePair) -> None:
    a, b = pair()
    conn = moved(a, b, lambda conn: None)
    query = Query(conn)
    query.cancel()
    assert isinstance(query.end(), psycopg2.errors.QueryCanceled)
    conn.rollback()
    assert ask(conn, "SELECT 1") == 1


def test_the_object_of_a_connection_that_was_given_is_dead(pair: MakePair) -> None:
    a, b = pair()
    old = a.get_conn()
    a.put_conn(old)
    got = b.get_conn()
    ask(got, "SELECT 1")
    for use in (old.cancel, old.commit, lambda: ask(old, "SELECT 1")):
        with pytest.raises(psycopg2.InterfaceError, match="already closed"):
            use()
    old.close()
    assert ask(got, "SELECT 1") == 1


def test_configure_runs_again_and_its_settings_hold(pair: MakePair) -> None:
    def configure(conn: extensions.connection) -> None:
        with conn.cursor() as cursor:
            cursor.execute("SET statement_timeout TO '7s'")
        conn.commit()

    a, b = pair(configure=configure)
    conn = moved(a, b, lambda conn: None)
    assert ask(conn, "SHOW statement_timeout") == "7s"


def test_configure_runs_on_what_came_for_one_who_had_left(
    pair: MakePair, broker: sharedpool.Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies idle then, and the next checkout is a short one."""

    def configure(conn: extensions.connection) -> None:
        with conn.cursor() as cursor:
            cursor.execute("SET statement_timeout TO '7s'")
        conn.commit()

    _, b = pair(configure=configure)
    leave_what_comes(b, broker, monkeypatch)
    wait_until(lambda: b.stats().idle == 1)
    conn = b.get_conn()
    assert ask(conn, "SHOW statement_timeout") == "7s"


def test_with_reset_rollback_settings_move_along_but_no_listening(pair: MakePair) -> None:
    a, b = pair(reset="rollback")

    def use(conn: extensions.connection) -> None:
        conn.cursor().execute("SET statement_timeout TO '9s'; LISTEN news")
        conn.commit()

    conn = moved(a, b, use)
    assert ask(conn, "SHOW statement_timeout") == "9s"
    assert ask(conn, "SELECT count(*) FROM pg_listening_channels()") == 0


def test_a_process_that_waits_before_it_knows_the_broker_is_passed_a_connection(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str
) -> None:
    settings = {"dsn": postgres.dsn, "broker": broker.address, "name": name, "max_conn": 1}
    with workers(2, **settings) as (first, second):
        held = first.ask("get", name="x", timeout=20)["backend"]
        second.send("get", name="x", timeout=20)
        wait_until(lambda: report(broker, name).waiting == 1)
        first.ask("put", name="x")
        assert second.answer()["backend"] == held


def test_handover_off_closes_and_opens(
    pair: MakePair, broker: sharedpool.Broker, name: str
) -> None:
    a, b = pair(handover="off")
    conn = a.get_conn()
    pid = conn.info.backend_pid
    a.put_conn(conn)
    assert b.get_conn().info.backend_pid != pid
    assert report(broker, name).handovers == 0


def test_a_process_that_can_build_no_shell_goes_on_without(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, b = pair()
    monkeypatch.setattr("sharedpool.worker.connection.stub_server.StubServer.port", 1 << 20)
    b._local.shells._stock.clear()
    conn = b.get_conn()
    assert ask(conn, "SELECT 1") == 1
    assert "no hand-over in this process" in caplog.text


def test_a_process_where_an_adopted_connection_does_not_work_goes_on_without(
    pair: MakePair,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    postgres: EphemeralPostgres,
    broker: sharedpool.Broker,
    name: str,
) -> None:
    """The self-test finds it: here a shell that speaks with another backend than it says."""
    a, b = pair()
    others: list[extensions.connection] = []
    shells = b._local.shells
    build, built = shells._build, set[PooledConnection]()
    monkeypatch.setattr(shells, "_build", lambda *of: built.add(shell := build(*of)) or shell)

    def go_wrong(shell: PooledConnection, sock: Owned, live: Live) -> PooledConnection:
        if shell not in built:
            return adopt(shell, sock, live)
        others.append(psycopg2.connect(postgres.dsn))
        os.dup2(others[-1].fileno(), sock.fileno())
        return adopt(shell, sock, live)

    monkeypatch.setattr("sharedpool.worker.receiving.adopt", go_wrong)
    rounds = 0
    while b._local.handover_enabled:
        rounds += 1
        assert rounds < 20
        shells._stock.clear()  # what was given leaves an empty connection that works
        conn = b.get_conn()
        assert ask(conn, "SELECT pg_backend_pid()") == conn.info.backend_pid
        b.put_conn(conn)
        a.put_conn(a.get_conn())
    assert rounds >= 3  # once or twice it may have been a slow server
    assert "no hand-over in this process" in caplog.text
    assert b._local.adopted == 0
    wait_until(
        lambda: report(broker, name).leases == 1,
        10,
        "the connection that was passed in vain to be ended",
    )


def test_the_first_connection_that_a_broker_passes_is_tried_with_a_cancel(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[LocalPool, Token]] = []
    cancel = LocalPool.cancel_query

    def note(local: LocalPool, token: Token, **options: bool) -> None:
        sent.append((local, token))
        cancel(local, token, **options)

    monkeypatch.setattr(LocalPool, "cancel_query", note)
    a, b = pair(timeout=1)  # which moves it from the second to the first
    assert a._local.adopted == 1
    assert sent == []  # a cancel that is lost would cost its caller a second
    b.put_conn(b.get_conn(timeout=10))
    assert [local for local, _ in sent] == [b._local]
    assert b._local.adopted == 1
    for giver, taker in ((b, a), (a, b)):
        conn = moved(giver, taker, lambda conn: None)
        assert ask(conn, "SELECT pg_sleep(0.05)") == ""
        taker.put_conn(conn)
    assert len(sent) == 1  # once has to do


def test_where_the_broker_may_not_cancel_connections_are_not_handed_over(
    server_connection: extensions.connection, postgres: EphemeralPostgres, tmp_path: Path
) -> None:
    """Its role is not the workers', and no member of it: nobody could cancel a query of a
    connection that has moved."""
    with server_connection.cursor() as cursor:
        cursor.execute("CREATE ROLE watcher LOGIN")
    dsn = extensions.make_dsn(postgres.dsn, user="watcher")
    with sharedpool.start_broker(5, address=f"ipc://{tmp_path}/b.sock", dsn=dsn) as broker:
        config = sharedpool.config_pool(
            name="watched", dsn=postgres.dsn, broker=broker.address, max_conn=1
        ).config
        pools = [ThreadedConnectionPool(config, GivenBroker(broker.address)) for _ in range(2)]
        for pool in pools * 5:
            conn = pool.get_conn(timeout=10)
            assert ask(conn, "SELECT pg_backend_pid()") == conn.info.backend_pid
            pool.put_conn(conn)
        late = ThreadedConnectionPool(config, GivenBroker(broker.address))
        late.put_conn(late.get_conn(timeout=10))
        assert report(broker, "watched").handovers == 1  # the trial
        assert [pool._local.adopted for pool in pools] == [0, 0]
        assert [pool._local.hands_over for pool in (*pools, late)] == [True, True, False]
        for pool in (*pools, late):
            pool.release_all()


def test_a_backend_that_ends_on_the_way_is_not_handed_out(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch, server_connection: extensions.connection
) -> None:
    _, b = pair()
    ended: list[int] = []

    def adopt_too_late(shell: PooledConnection, sock: Owned, live: Live) -> PooledConnection:
        with server_connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [live.backend.pid])
        ended.append(live.backend.pid)
        return adopt(shell, sock, live)

    monkeypatch.setattr("sharedpool.worker.receiving.adopt", adopt_too_late)
    conn = b.get_conn()
    assert ask(conn, "SELECT pg_backend_pid()") not in ended
    assert len(ended) == 1
    assert b._local.handover_enabled


def test_a_shell_is_built_for_this_process_alone() -> None:
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('\\0' + sys.argv[1]);"
        " print(s.recv(1))"
    )
    with StubServer(
        {"server_version": "15.1", "client_encoding": "UTF8", "DateStyle": "ISO"}
    ) as stub:
        name = f"{stub.host[1:]}/.s.PGSQL.{stub.port}"
        other = run_python(script, name)
        ours = psycopg2.connect(
            host=stub.host, port=stub.port, user="shell", dbname="shell", sslmode="disable"
        )
    assert other.stdout == "b''\n", other.stderr
    assert ours.server_version == 150001


def test_a_parked_connection_expires(pair: MakePair, broker: sharedpool.Broker, name: str) -> None:
    """Given while nobody waits any more: the broker keeps it, but no longer than a worker would."""
    _, b = pair(expiration=0.5)
    held = b.get_conn()
    b.put_conn(held)
    wait_until(lambda: report(broker, name).leases == 0, 10, "the connection to expire")


def test_a_backend_that_ends_while_parked_or_moving_is_not_handed_out(
    pair: MakePair, server_connection: extensions.connection
) -> None:
    a, b = pair()
    rng = random.Random(1)
    for _ in range(20):
        giver, taker = rng.sample((a, b), 2)
        conn = giver.get_conn()
        pid = conn.info.backend_pid
        giver.put_conn(conn)
        with server_connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        got = taker.get_conn()
        assert ask(got, "SELECT pg_backend_pid()") != pid
        taker.put_conn(got)
    assert a._local.handover_enabled  # that is no reason to do without
    assert b._local.handover_enabled


def test_threads_of_several_processes_share_few_connections(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str
) -> None:
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 3,
        "threads": True,
    }
    with (
        workers(4, **settings) as crew,
        BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler,
    ):
        for worker in crew:
            worker.send("hammer", seconds=2, threads=3, timeout=30)
        outcomes = [worker.answer() for worker in crew]
    assert [outcome["errors"] for outcome in outcomes] == [[]] * 4
    assert min(outcome["done"] for outcome in outcomes) > 0
    assert sampler.peak <= 3


@pytest.mark.long_variants
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_no_slot_is_lost_with_a_process_that_ends_or_stops_in_the_middle_of_a_transfer(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, number: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 2,
    }
    stop = tmp_path / "stop"
    rng = random.Random(number)
    with (
        workers(4, **settings) as crew,
        BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler,
    ):
        for worker in crew:
            worker.send("hammer", seconds=60, threads=1, timeout=30, work_s=0.001, stop=str(stop))
        for each in range(
            3 if number == signal.SIGKILL else 1
        ):  # a frozen one holds up the rest for a TTL
            enough = tmp_path / f"enough of {each}"
            with Worker(**settings) as victim:
                victim.send(
                    "hammer", seconds=60, threads=1, timeout=30, work_s=0.001, stop=str(enough)
                )
                wait_until(
                    lambda: report(broker, name).sessions >= 5, 10, "the victim to take part"
                )
                handovers = report(broker, name).handovers + rng.randrange(1, 50)
                wait_until(
                    lambda n=handovers: report(broker, name).handovers >= n, 10, "some transfers"
                )
                victim.kill(number)
                handovers = report(broker, name).handovers
                wait_until(
                    lambda n=handovers: report(broker, name).handovers > n,
                    10,
                    "the others to go on",
                )
                enough.touch()
        stop.touch()
        outcomes = [worker.answer() for worker in crew]
    assert [outcome["errors"] for outcome in outcomes] == [[]] * 4
    assert sampler.peak <= 2


_TWO_RECEIVE = """
import os, sys, threading, warnings
import sharedpool
from sharedpool.worker.connection import reset

reset.LIMIT_S = 60.0  # the backends are stopped meanwhile
warnings.simplefilter("ignore")  # a fork with threads is what Python 3.12 warns of
pool = sharedpool.config_pool(2, dsn=sys.argv[1], broker=sys.argv[2], name=sys.argv[3], timeout=60,
                              pool_manager=sharedpool.ThreadedConnectionPool)
pool.put_conn(pool.get_conn())
print("ready", flush=True)
input()
answers = []

def use():
    with pool.connection() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT 42")
        answers.append(cursor.fetchone()[0])

threads = [threading.Thread(target=use) for _ in range(2)]
for thread in threads:
    thread.start()
input()
read, write = os.pipe()
if not os.fork():
    os.close(write)
    print(os.getpid(), flush=True)
    os.read(read, 1)  # until the parent ends
    os._exit(0)
for thread in threads:
    thread.join()
print(answers, pool.stats().adopted)
"""


def _sockets(pid: int) -> set[str]:
    """Return the sockets that a process has open."""
    found: set[str] = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(each.readlink()))
    return {each for each in found if each.startswith("socket:")}


def test_a_fork_while_several_threads_receive_leaves_all_that_arrives_to_the_parent(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str
) -> None:
    command = [sys.executable, "-c", _TWO_RECEIVE, postgres.dsn, broker.address, name]
    with (
        Piped(*command) as taker,
        Worker(dsn=postgres.dsn, broker=broker.address, name=name, max_conn=2) as giver,
    ):
        assert taker.line() == "ready"
        backends = [giver.ask("get", name=key, timeout=20)["backend"] for key in "xy"]
        taker.tell("wait")
        wait_until(lambda: report(broker, name).waiting == 2)
        before = _sockets(taker.pid)
        for backend in backends:
            os.kill(backend, signal.SIGSTOP)  # their resets take for as long
        try:
            for key in "xy":
                giver.ask("put", name=key)
            arriving = wait_until(
                lambda: new if len(new := _sockets(taker.pid) - before) == 2 else None
            )
            taker.tell("fork")
            child = int(taker.line())
            assert _sockets(child) & arriving == set()
            assert _sockets(taker.pid) >= arriving
        finally:
            for backend in backends:
                os.kill(backend, signal.SIGCONT)
        assert taker.line() == "[42, 42] 2"


@pytest.mark.long
def test_rows_are_read_and_written_correctly_over_thousands_of_moves(
    broker: sharedpool.Broker,
    postgres: EphemeralPostgres,
    name: str,
    server_connection: extensions.connection,
) -> None:
    """Each process writes rows of its own and reads them back, by checksum; no row is another's,
    lost or doubled."""
    with server_connection.cursor() as cursor:
        cursor.execute("CREATE TABLE moves (worker int, n int, body text, PRIMARY KEY (worker, n))")
    total = _MOVES
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 2,
        "time_slice": 0,
    }
    try:
        with workers(5, **settings) as crew:
            for number, worker in enumerate(crew):
                worker.send("write_rows", worker=number, count=total // 5)
            answers = [worker.answer(600) for worker in crew]
            moves = report(broker, name).handovers
        assert [answer.get("wrong", answer) for answer in answers] == [0] * 5
        assert moves > total // 2
        with server_connection.cursor() as cursor:
            cursor.execute("SELECT worker, n, body FROM moves")
            rows = cursor.fetchall()
    finally:
        with server_connection.cursor() as cursor:
            cursor.execute("DROP TABLE moves")
    assert len(rows) == total // 5 * 5
    assert all(
        body == hashlib.sha256(f"{worker} {n}".encode()).hexdigest() * 4 for worker, n, body in rows
    )


def test_nothing_is_handed_over_between_processes_that_connect_to_different_databases(
    broker: sharedpool.Broker, database: str, postgres: EphemeralPostgres
) -> None:
    settings = {"broker": broker.address, "name": "one name, two databases", "max_conn": 1}
    names: dict[Worker, set[str]] = {}
    with (
        workers(1, dsn=database, **settings) as (first,),
        workers(1, dsn=postgres.dsn, **settings) as (second,),
    ):
        for _ in range(3):  # to and fro
            for each in (first, second):
                assert "backend" in each.ask("get", name="it", timeout=10)
                rows = each.ask("query", name="it", sql="SELECT current_database()")["rows"]
                names.setdefault(each, set()).add(rows[0][0])
                assert "at" in each.ask("put", name="it")
    found = extensions.parse_dsn(database)["dbname"]
    assert names == {first: {found}, second: {"postgres"}}
