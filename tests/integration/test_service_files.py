"""The broker under supervisor and Kubernetes: what the files in examples/ say is run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sharedpool.cli.client import fetch_report
from tests.integration.service_programs import EXAMPLES, environment, serves, started
from tests.support.waiting import wait_until

__all__ = ["environment"]  # pytest finds it here


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
