"""The dashboard in examples/: Grafana can read it, and Prometheus has what it asks for."""

from __future__ import annotations

import json
import re
import shutil
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.integration.service_programs import EXAMPLES, started
from tests.support.broker_process import running
from tests.support.processes import Worker
from tests.support.waiting import wait_until


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
