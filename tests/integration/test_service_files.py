"""The broker under systemd, supervisor and Kubernetes: what the files in examples/ say is run;
sd_notify is heard."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from sharedpool.cli.client import fetch_report
from sharedpool.errors import BrokerUnavailable
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.broker_process import running
from tests.support.processes import Worker
from tests.support.waiting import wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMAND = [sys.executable, "-m", "sharedpool"]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, postgres: EphemeralPostgres) -> None:
    """PATH has this environment's commands, DATABASE_DSN tells the server."""
    monkeypatch.setenv(
        "PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    monkeypatch.setenv("DATABASE_DSN", postgres.dsn)


@contextmanager
def started(command: list[str], **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **more
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def serves(address: str) -> bool:
    try:
        return fetch_report(address, 1.0).state in ("serving", "waiting")
    except BrokerUnavailable:
        return False


# --- systemd


@contextmanager
def supervisor_socket(address: str) -> Iterator[socket.socket]:
    """What systemd listens at: a datagram socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(30)
        listener.bind("\0" + address[1:] if address.startswith("@") else address)
        yield listener


@pytest.mark.long_variants
@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_hears_when_the_broker_serves_and_when_it_ends(
    kind: str, runtime_dir: Path
) -> None:
    if kind == "abstract" and sys.platform != "linux":
        pytest.skip("abstract sockets are Linux's")
    notify = f"{runtime_dir}/notify" if kind == "path" else f"@sharedpool-test-{os.getpid()}"
    address = f"ipc://{runtime_dir}/broker.sock"
    environment = dict(os.environ, NOTIFY_SOCKET=notify)
    with (
        supervisor_socket(notify) as listener,
        started(
            [*COMMAND, "broker", "--max-conn", "2", "--bind", address], env=environment
        ) as process,
    ):
        assert listener.recv(100) == b"READY=1"
        assert serves(address)
        process.terminate()
        assert listener.recv(100) == b"STOPPING=1"
        assert process.wait(20) == 0


def test_a_socket_that_nobody_listens_at_keeps_nobody_from_serving(runtime_dir: Path) -> None:
    address = f"ipc://{runtime_dir}/broker.sock"
    environment = dict(os.environ, NOTIFY_SOCKET=f"{runtime_dir}/nobody")
    with started(
        [*COMMAND, "broker", "--max-conn", "2", "--bind", address], env=environment
    ) as process:
        wait_until(lambda: serves(address), timeout_s=30)
        process.terminate()
        assert process.wait(20) == 0


def test_only_the_broker_that_is_a_service_speaks_for_it(runtime_dir: Path) -> None:
    """Under `sharedpool run` the command is the service: READY is its to say."""
    notify = f"{runtime_dir}/notify"
    say = "import os, socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM);"
    say += " s.sendto(b'the command', os.environ['NOTIFY_SOCKET'])"
    with supervisor_socket(notify) as listener:
        done = subprocess.run(
            [*COMMAND, "run", "--max-conn", "2", "--", sys.executable, "-c", say],
            env=dict(os.environ, NOTIFY_SOCKET=notify),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert listener.recv(100) == b"the command"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.recv(100)


def unit(name: str, **replaced: str) -> str:
    text = (EXAMPLES / "systemd" / name).read_text()
    for old, new in {"/usr/local/bin/": f"{Path(sys.executable).parent}/", **replaced}.items():
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("name", ["sharedpool.service", "sharedpool.socket", "gunicorn.service"])
def test_systemd_finds_nothing_wrong_with_the_units(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for each in ("sharedpool.service", "gunicorn.service"):
        (tmp_path / each).write_text(unit(each))
    (tmp_path / "sharedpool.socket").write_text(
        (EXAMPLES / "systemd" / "sharedpool.socket").read_text()
    )
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_units_command_starts_the_broker_and_says_so(
    environment: None, runtime_dir: Path
) -> None:
    text = unit(
        "sharedpool.service",
        **{"/run/sharedpool": str(runtime_dir), "127.0.0.1:9187": "127.0.0.1:0"},
    )
    settings = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    notify = f"{runtime_dir}/notify"
    more = {"SHAREDPOOL_MAX_CONN": "2", "NOTIFY_SOCKET": notify}
    with (
        supervisor_socket(notify) as listener,
        started(shlex.split(settings["ExecStart"]), env=dict(os.environ, **more)) as process,
    ):
        assert settings["Type"] == "notify"
        assert listener.recv(100) == b"READY=1"
        assert serves(f"ipc://{runtime_dir}/broker.sock")
        process.send_signal(signal.SIGTERM)
        assert process.wait(int(settings["TimeoutStopSec"])) == 0


ACTIVATE = shutil.which("systemd-socket-activate")


@pytest.mark.skipif(ACTIVATE is None, reason="systemd-socket-activate is not installed")
@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_a_broker_is_started_by_who_wants_it_at_a_socket_that_is_not_its_own(
    kind: str, postgres: EphemeralPostgres, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ACTIVATE is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = (
            f"{runtime_dir}/broker.sock" if kind == "ipc" else f"127.0.0.1:{free.getsockname()[1]}"
        )
    # It waits for the first connection, then becomes the broker.
    command = [
        ACTIVATE,
        "-l",
        place,
        *COMMAND,
        "broker",
        "--max-conn",
        "2",
        "--dsn",
        postgres.dsn,
        "--ttl",
        "3",
    ]
    with started(command, env=os.environ) as process:
        address = f"{kind}://{place}"
        with Worker(dsn=postgres.dsn, broker=address) as worker:
            assert "backend" in worker.ask("get", name="x", timeout=20)
            (session,) = fetch_report(address).sessions
            assert session.pid == worker.pid
            worker.ask("put", name="x")
        process.terminate()
        assert process.wait(20) == 0
    if kind == "ipc":
        assert Path(place).is_socket()  # not the broker's to remove


@pytest.mark.parametrize(("count", "complaint"), [("2", "one socket"), ("1", "--bind")])
def test_a_socket_that_cannot_be_used_is_said_so(
    count: str, complaint: str, runtime_dir: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{runtime_dir}/other.sock")
        listener.listen()
        start = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = "
            "str(os.getpid());"
            " os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
        )
        broker = [
            "-m",
            "sharedpool",
            "broker",
            "--max-conn",
            "1",
            "--bind",
            f"ipc://{runtime_dir}/broker.sock",
        ]
        done = subprocess.run(
            [sys.executable, "-c", start, str(listener.fileno()), *broker],
            env=dict(os.environ, LISTEN_FDS=count),
            pass_fds=[listener.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, complaint in done.stderr) == (2, True), done.stderr


# --- supervisor


@pytest.mark.long
def test_supervisor_runs_broker_and_application(environment: None, runtime_dir: Path) -> None:
    text = (EXAMPLES / "supervisord.conf").read_text()
    text = (
        text.replace("/run/app", str(runtime_dir))
        .replace("%(here)s", str(EXAMPLES))
        .replace(":9187", ":0")
    )
    config = runtime_dir / "supervisord.conf"
    config.write_text(text)

    def answer() -> dict[str, int] | None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            try:
                client.connect(f"{runtime_dir}/web.sock")
            except (FileNotFoundError, ConnectionRefusedError):
                return None
            client.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        assert b" 200 " in answer.splitlines()[0], answer
        found: dict[str, int] = json.loads(answer.partition(b"\r\n\r\n")[2])
        return found

    with started([sys.executable, "-m", "supervisor.supervisord", "-c", str(config)]) as process:
        first = wait_until(answer, timeout_s=60, what="the application")
        assert 1 <= first["connections"] <= 3
        # It is the broker of this file that they use: killed, it is started again, and nobody
        # notices.
        address = f"ipc://{runtime_dir}/broker.sock"
        before = fetch_report(address)
        assert before.pools[0].sessions >= 1
        os.kill(before.pid, signal.SIGKILL)
        wait_until(
            lambda: serves(address) and fetch_report(address).pid != before.pid, timeout_s=30
        )
        assert answer()
        process.terminate()
        assert process.wait(60) == 0


# --- Kubernetes


def containers(name: str) -> dict[str, dict[str, Any]]:
    """The containers of a manifest's one Deployment, by name."""
    (deployment,) = [
        each
        for each in yaml.safe_load_all((EXAMPLES / "kubernetes" / name).read_text())
        if each["kind"] == "Deployment"
    ]
    spec = deployment["spec"]["template"]["spec"]
    return {each["name"]: each for each in [*spec.get("initContainers", ()), *spec["containers"]]}


def test_the_command_of_a_pods_broker_works(environment: None, runtime_dir: Path) -> None:
    broker = containers("sidecar.yaml")["broker"]
    places = {
        "ipc:///run/sharedpool/broker.sock": f"ipc://{runtime_dir}/broker.sock",
        "0.0.0.0:9187": "127.0.0.1:0",
    }
    (told,) = [each["value"] for each in broker["env"] if each["name"] == "SHAREDPOOL_BROKER"]
    settings = dict(os.environ, SHAREDPOOL_BROKER=places[told])
    command = [places.get(word, word) for word in [*broker["command"], *broker["args"]]]
    probe = broker["startupProbe"]
    with started(command, env=settings):

        def ready() -> bool:
            done = subprocess.run(
                probe["exec"]["command"], env=settings, capture_output=True, check=False
            )
            return done.returncode == 0

        wait_until(ready, timeout_s=30)


def test_all_containers_of_the_sidecars_pod_see_one_socket() -> None:
    found = containers("sidecar.yaml")
    assert (
        found["broker"]["restartPolicy"] == "Always"
    )  # else it is no sidecar, and the others would never start
    assert set(found) == {"broker", "web", "celery"}
    for each in found.values():
        (address,) = [
            variable["value"] for variable in each["env"] if variable["name"] == "SHAREDPOOL_BROKER"
        ]
        (mount,) = each["volumeMounts"]
        assert address.startswith(f"ipc://{mount['mountPath']}/")


# --- Grafana


def test_the_dashboard_is_one_to_grafanas_own_library() -> None:
    """Grafana's types, made from its schema, take it in and give it back with every panel and
    query."""
    register_default_plugins()
    raw = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(raw)))
    assert again["title"] == raw["title"]
    assert [(panel["type"], panel["title"]) for panel in again["panels"]] == [
        (panel["type"], panel["title"]) for panel in raw["panels"]
    ]
    assert _queries(again) == _queries(raw) != []


def _queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_asks_only_for_metrics_that_there_are(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    dashboard = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries = targets + [
        each["definition"] for each in dashboard["templating"]["list"] if each["type"] == "query"
    ]
    with (
        running(postgres.dsn, runtime_dir) as broker,
        Worker(dsn=postgres.dsn, broker=broker.address) as worker,
    ):
        worker.ask("cycle", count=1)
        wait_until(lambda: broker.value("sharedpool_sessions", "default") == 1)
        samples = [
            x
            for family in text_string_to_metric_families(broker.fetch("/metrics"))
            for x in family.samples
        ]
    names = {sample.name for sample in samples}
    labels = {
        "job",
        *(label for sample in samples for label in sample.labels),
    }  # `job` is Prometheus's own
    asked = {
        name for query in queries for name in re.findall(r"\b(?:db_client|sharedpool)_\w+", query)
    }
    assert len(queries) > 20
    assert asked - labels <= names
    assert {label for query in queries for label in re.findall(r"(\w+)=~?\"", query)} <= labels
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


PROMETHEUS = shutil.which("prometheus")


@pytest.mark.skipif(PROMETHEUS is None, reason="no Prometheus: apt-get install prometheus")
def test_prometheus_has_an_answer_to_every_query_of_the_dashboard(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    assert PROMETHEUS is not None
    dashboard = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    values = {"$__rate_interval": "20s", "$pool": ".*", "$job": ".*"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def answer(query: str) -> list[Any]:
        for name, value in values.items():
            query = query.replace(name, value)
        url = f"http://127.0.0.1:{port}/api/v1/query?{urlencode({'query': query})}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                found: list[Any] = json.loads(response.read())["data"]["result"]
        except urllib.error.HTTPError as error:
            if error.code == 503:
                return []  # it is still starting
            raise AssertionError(f"{query}: {error.read().decode()}") from None
        except urllib.error.URLError:
            return []  # it does not listen yet
        return found

    with (
        running(postgres.dsn, runtime_dir) as broker,
        Worker(dsn=postgres.dsn, broker=broker.address) as worker,
    ):
        config = runtime_dir / "prometheus.yml"
        targets = f"[{{targets: ['127.0.0.1:{broker.port}']}}]"
        config.write_text(
            f"global: {{scrape_interval: 1s}}\nscrape_configs: "
            f"[{{job_name: sharedpool, static_configs: {targets}}}]\n"
        )
        worker.ask("cycle", count=10)
        command = [
            PROMETHEUS,
            "--config.file",
            str(config),
            "--storage.tsdb.path",
            str(runtime_dir / "tsdb"),
        ]
        with started([*command, "--web.listen-address", f"127.0.0.1:{port}"]):
            for query in queries:  # a rate wants two scrapes
                wait_until(lambda query=query: answer(query), timeout_s=30, what=query)
