"""What an agent sees of a program: each recorder has one agent, from its own package, trace into
memory."""

import os
from collections.abc import Callable
from typing import Any, Protocol

Span = dict[str, Any]


class Recorder(Protocol):
    def record(self, run: Callable[[], object]) -> list[Span]:
        """Return the spans of what is traced as one request, and those of other
        threads meanwhile."""


class Ddtrace:
    def __init__(self) -> None:
        os.environ.update(
            DD_INSTRUMENTATION_TELEMETRY_ENABLED="false", DD_REMOTE_CONFIGURATION_ENABLED="false"
        )
        from ddtrace import patch
        from ddtrace.trace import TraceFilter, tracer

        spans: list[Span] = []

        class Collect(TraceFilter):
            def process_trace(self, trace: Any) -> None:
                spans.extend(
                    {"name": span.name, "resource": span.resource}
                    | {
                        tag: span.get_tag(tag)
                        for tag in ("db.name", "db.user", "out.host", "component", "error.type")
                    }
                    | {"port": span.get_metric("network.destination.port")}
                    for span in trace
                )

        patch(psycopg=True)
        tracer.configure(trace_processors=[Collect()])
        self._tracer, self._spans = tracer, spans

    def record(self, run: Callable[[], object]) -> list[Span]:
        self._spans.clear()
        with self._tracer.trace("request"):
            run()
        return [span for span in self._spans if span["name"] != "request"]


class DdtraceWithConnects(Ddtrace):
    def __init__(self) -> None:
        os.environ["DD_PSYCOPG_TRACE_CONNECT"] = "true"
        super().__init__()


class Elastic:
    def __init__(self) -> None:
        import elasticapm
        from elasticapm.conf.constants import SPAN

        spans: list[Span] = []

        class Client(elasticapm.Client):
            def queue(self, event_type: str, data: dict[str, Any], flush: bool = False) -> None:
                if event_type == SPAN:
                    context = data["context"]
                    spans.append(
                        {
                            "name": data["name"],
                            "type": data["action"],
                            "outcome": data["outcome"],
                            **context,
                        }
                    )

        self._client = Client(
            service_name="tests",
            disable_send=True,
            cloud_provider="none",
            central_config=False,
            metrics_interval="0s",
            server_url="http://127.0.0.1:9",
            span_compression_enabled=False,
            exit_span_min_duration="0ms",
            transport_class="elasticapm.transport.base.Transport",
            collect_local_variables="off",
            span_stack_trace_min_duration=-1,
        )
        elasticapm.instrument()
        self._spans = spans

    def record(self, run: Callable[[], object]) -> list[Span]:
        self._spans.clear()
        self._client.begin_transaction("request")
        run()
        self._client.end_transaction("request")
        return [dict(span) for span in self._spans]


class NewRelic:
    def __init__(self) -> None:
        os.environ.update(
            NEW_RELIC_DEVELOPER_MODE="true",
            NEW_RELIC_LICENSE_KEY="0" * 40,
            NEW_RELIC_APP_NAME="tests",
        )
        os.environ.update(NEW_RELIC_LOG="/dev/null")
        import newrelic.agent
        from newrelic.core.stats_engine import StatsEngine

        newrelic.agent.initialize()
        self._agent = newrelic.agent
        self._application = newrelic.agent.register_application(timeout=10.0)
        spans: list[Span] = []

        def record_transaction(_: object, transaction: Any) -> None:
            pending = list(transaction.root.children)
            while pending:
                node = pending.pop(0)
                if hasattr(node, "sql"):
                    place = {
                        name: getattr(node, name)
                        for name in ("host", "port_path_or_id", "database_name")
                    }
                    spans.append({"name": node.sql, **place})
                else:
                    spans.append({"name": node.name})
                pending[:0] = node.children

        StatsEngine.record_transaction = record_transaction
        self._spans = spans

    def record(self, run: Callable[[], object]) -> list[Span]:
        self._spans.clear()
        with self._agent.BackgroundTask(self._application, name="request"):
            run()
        return list(self._spans)


class OpenTelemetry:
    def __init__(self) -> None:
        from opentelemetry import trace
        from opentelemetry.instrumentation.psycopg2 import Psycopg2Instrumentor
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        trace.set_tracer_provider(provider)
        Psycopg2Instrumentor().instrument()

    def record(self, run: Callable[[], object]) -> list[Span]:
        self._exporter.clear()
        run()
        return [
            {"name": span.name, **(span.attributes or {})}
            for span in self._exporter.get_finished_spans()
        ]


class Sentry:
    """It has nothing for psycopg2 alone, but looks at a connection under Django and SQLAlchemy."""

    def __init__(self) -> None:
        import sentry_sdk
        from sentry_sdk.transport import Transport

        spans: list[Span] = []

        class Collect(Transport):
            def capture_envelope(self, envelope: Any) -> None:
                for item in envelope.items:
                    for span in (
                        (item.payload.json or {}).get("spans", [])
                        if item.type == "transaction"
                        else []
                    ):
                        data = {
                            key: span["data"][key]
                            for key in span["data"]
                            if key.startswith(("db.", "server."))
                        }
                        spans.append({"name": span["description"], **data})

        sentry_sdk.init(
            dsn="http://key@127.0.0.1:9/1",
            transport=Collect,
            traces_sample_rate=1.0,
            auto_session_tracking=False,
        )
        self._sdk, self._spans = sentry_sdk, spans

    def record(self, run: Callable[[], object]) -> list[Span]:
        self._spans.clear()
        with self._sdk.start_transaction(name="request"):
            run()
        return list(self._spans)


class XRay:
    def __init__(self) -> None:
        from aws_xray_sdk.core import patch, xray_recorder

        spans: list[Span] = []

        class Collect:
            def send_entity(self, entity: Any) -> None:
                pending = list(entity.subsegments)
                while pending:
                    each = pending.pop(0)
                    spans.append(
                        {"name": each.name, "namespace": each.namespace, **(each.sql or {})}
                    )
                    pending[:0] = each.subsegments

            def set_daemon_address(self, address: object) -> None:
                """There is no daemon."""

        xray_recorder.configure(sampling=False, service="tests", context_missing="LOG_ERROR")
        xray_recorder.emitter = Collect()
        patch(("psycopg2",))
        self._recorder, self._spans = xray_recorder, spans

    def record(self, run: Callable[[], object]) -> list[Span]:
        self._spans.clear()
        self._recorder.begin_segment("request")
        run()
        self._recorder.end_segment()
        return list(self._spans)


RECORDERS: dict[str, Callable[[], Recorder]] = {
    "aws-xray-sdk": XRay,
    "ddtrace": Ddtrace,
    "ddtrace with connects": DdtraceWithConnects,
    "elastic-apm": Elastic,
    "newrelic": NewRelic,
    "opentelemetry": OpenTelemetry,
    "sentry-sdk": Sentry,
}
