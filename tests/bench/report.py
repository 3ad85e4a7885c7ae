"""What a row has measured, and the tables of it.

Pure but for the JSON and the Markdown being text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.bench.stats import Spread, curve, percentile, ratios, spread

US = "sharedpool"


@dataclass(frozen=True)
class Metric:
    """One kind of figure. `digits` are those behind the point."""

    name: str
    unit: str
    digits: int = 2

    def show(self, value: float) -> str:
        return f"{value:,.{self.digits}f}"

    def describe(self, values: Sequence[float]) -> str:
        """Return the median with its unit, and the least and the greatest when there
        are several."""
        of = spread(values)
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.show(of.median)}{unit}" + (
            f" ({self.show(of.least)}–{self.show(of.most)})" * (len(values) > 1)
        )


THROUGHPUT = Metric("throughput", "/s", 0)
MEAN_US = Metric("mean", "µs")
P50_MS = Metric("p50", "ms")
P99_MS = Metric("p99", "ms")
FAIRNESS = Metric("fairness", "")


@dataclass(frozen=True)
class Comparison:
    """A ratio that a row is about: one metric of `ours` through the same of `peer`."""

    metric: Metric
    peer: str
    ours: str = US


@dataclass
class Sample:
    """What one contestant's turn gave: one value for each metric, and perhaps the latencies behind
    them."""

    figures: dict[Metric, float]
    latencies_ms: Sequence[float] = ()


@dataclass
class Result:
    """One row.

    `samples` has one value for each round; `unmeasured` says of each contestant that is missing
    why.
    """

    name: str
    title: str
    goal: str = ""
    comparisons: tuple[Comparison, ...] = ()
    samples: dict[str, dict[Metric, list[float]]] = field(default_factory=dict)
    latencies_ms: dict[str, list[float]] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    def add(self, contestant: str, sample: Sample) -> None:
        """Record one contestant's turn."""
        figures = self.samples.setdefault(contestant, {})
        for metric, value in sample.figures.items():
            figures.setdefault(metric, []).append(value)
        self.latencies_ms.setdefault(contestant, []).extend(sample.latencies_ms)

    def values(self, contestant: str, metric: Metric) -> list[float]:
        return self.samples.get(contestant, {}).get(metric, [])

    def ratio(self, comparison: Comparison) -> Spread | None:
        """Return a comparison's ratio; None where one of the two was not measured."""
        mine = self.values(comparison.ours, comparison.metric)
        theirs = self.values(comparison.peer, comparison.metric)
        each = ratios(mine, theirs)
        return spread(each) if each else None


def describe_ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f} × ({ratio.least:.2f}–{ratio.most:.2f})"


def summary(results: Sequence[Result]) -> str:
    """Return one line for each row: its goal, and what was measured against each peer that the goal
    names."""
    lines = ["| row | goal | measured: median (least–greatest of the rounds) |", "|---|---|---|"]
    lines += [
        f"| {each.title} (`{each.name}`) | {each.goal or '–'} | {_measured(each)} |"
        for each in results
    ]
    return "\n".join(lines)


def _measured(result: Result) -> str:
    words: list[str] = []
    for comparison in result.comparisons:
        who = comparison.ours.removeprefix(US).strip(", ")
        what = f"{who}: " * bool(who) + f"{comparison.metric.name} "
        if (ratio := result.ratio(comparison)) is not None:
            words.append(f"{what}{describe_ratio(ratio)} {comparison.peer}")
    if not result.comparisons:
        for contestant, figures in result.samples.items():
            shown = ", ".join(
                f"{metric.name} {metric.describe(values)}" for metric, values in figures.items()
            )
            words.append(shown if contestant == US else f"{contestant}: {shown}")
    elif FAIRNESS in result.samples.get(US, {}):
        words.append(f"fairness {FAIRNESS.describe(result.values(US, FAIRNESS))}")
    words += [f"{who}: not measured ({why})" for who, why in result.unmeasured.items()]
    if result.error:
        words.append(f"**failed**: {last_line(result.error)}")
    return "<br>".join(_cell(word) for word in words)


def details(results: Sequence[Result]) -> str:
    """Return one line for each contestant of each row, with all its figures, and one for each that
    is missing."""
    lines = [
        "| row | contestant | figures: median (least–greatest of the rounds) |",
        "|---|---|---|",
    ]
    for result in results:
        lines += [
            f"| {result.name} | {_cell(who)} | {_figures(result, who)} |" for who in result.samples
        ]
        missing = result.unmeasured.items()
        lines += [
            f"| {result.name} | {_cell(who)} | not measured: {_cell(why)} |" for who, why in missing
        ]
        if result.error:
            lines.append(f"| {result.name} | – | failed: {_cell(last_line(result.error))} |")
    return "\n".join(lines)


def _figures(result: Result, contestant: str) -> str:
    figures = result.samples[contestant].items()
    return " · ".join(
        _cell(f"{metric.name} {metric.describe(values)}") for metric, values in figures
    )


def _cell(text: str) -> str:
    """Keep a text from ending its cell or its line."""
    return text.replace("|", "\\|").replace("\n", " ")


def last_line(text: str) -> str:
    """Return the last line that says something: of a traceback, the error."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def markdown(machine: Mapping[str, str], run: str, results: Sequence[Result]) -> str:
    """Return the whole report."""
    parts = ["# Benchmark", run, ", ".join(f"{name} {value}" for name, value in machine.items())]
    parts += [summary(results), "## All figures", details(results)]
    if notes := [f"- `{result.name}`: {note}" for result in results for note in result.notes]:
        parts += ["## Notes", "\n".join(notes)]
    for result in results:
        if result.error:
            parts += [f"## What failed in `{result.name}`", f"```\n{result.error.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def as_json(machine: Mapping[str, str], run: str, results: Sequence[Result]) -> str:
    """Return all figures for other programs. Latencies are cut down to their distribution."""
    found = {"machine": dict(machine), "run": run, "rows": [_row(result) for result in results]}
    return json.dumps(found, indent=1, ensure_ascii=False)


def _row(result: Result) -> dict[str, Any]:
    compared = [(comparison, result.ratio(comparison)) for comparison in result.comparisons]
    return {
        "name": result.name,
        "title": result.title,
        "goal": result.goal,
        "seconds": round(result.seconds, 1),
        "contestants": {
            who: {
                metric.name: {"unit": metric.unit, "rounds": values}
                for metric, values in figures.items()
            }
            for who, figures in result.samples.items()
        },
        "ratios": [
            {"metric": each.metric.name, "of": each.ours, "to": each.peer, **ratio._asdict()}
            for each, ratio in compared
            if ratio is not None
        ],
        "latencies_ms": {
            who: _distribution(each) for who, each in result.latencies_ms.items() if each
        },
        "unmeasured": result.unmeasured,
        "notes": result.notes,
        "error": result.error,
    }


def _distribution(latencies_ms: Sequence[float]) -> dict[str, Any]:
    percents = {
        f"p{percent:g}": round(percentile(latencies_ms, percent), 4)
        for percent in (50, 90, 99, 99.9, 100)
    }
    steps = [(round(value, 4), round(share, 5)) for value, share in curve(latencies_ms, 100)]
    return {"count": len(latencies_ms), **percents, "curve": steps}
