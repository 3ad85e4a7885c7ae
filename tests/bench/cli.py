"""The command line."""

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from tests.bench import machine, plots
from tests.bench.report import Result, as_json, markdown
from tests.bench.rows import ROWS
from tests.bench.runner import Bench, Row, run_row, say
from tests.bench.server import bench_server

_OURS = ("SHAREDPOOL_", "PG", "DATABASE_DSN", "DATABASE_URL")


def _chosen(context: click.Context, option: click.Parameter, value: str | None) -> list[Row]:
    """Return the rows that were asked for, in the table's order."""
    if value is None:
        return list(ROWS)
    names = {name.strip() for name in value.split(",")}
    if unknown := names - {row.name for row in ROWS}:
        raise click.BadParameter(
            f"no {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in ROWS)}"
        )
    return [row for row in ROWS if row.name in names]


def _slices(context: click.Context, option: click.Parameter, value: str) -> tuple[float, ...]:
    """Return seconds."""
    try:
        return tuple(float(text) / 1000 for text in value.split(",") if text.strip())
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of milliseconds") from None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--quick",
    is_flag=True,
    help="Short turns, in two or three minutes for all: to see that it works.",
)
@click.option(
    "--rows", callback=_chosen, help=f"Comma-separated: {', '.join(row.name for row in ROWS)}."
)
@click.option(
    "--slices",
    default="",
    callback=_slices,
    help="Also try these, in ms, in the contended rows: 1,2,5.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    help="How often each contestant has its turn.  [5; quick: 3]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/bench"),
    show_default=True,
    help="Where figures.json, figures.md and the plots go.",
)  # fmt: skip
def main(
    quick: bool, rows: list[Row], slices: tuple[float, ...], rounds: int | None, out: Path
) -> None:
    """Measure sharedpool and its peers."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # clear away as after Ctrl-C
    started = time.monotonic()
    with _clean_environment(), _directory() as directory, bench_server() as server:
        window_s, warm_s = (0.4, 0.15) if quick else (2.0, 0.5)
        bench = Bench(
            server, directory, rounds or (3 if quick else 5), window_s, warm_s, quick, slices
        )
        about = machine.describe(server)
        say(", ".join(f"{name} {value}" for name, value in about.items()))
        results = [run_row(bench, row) for row in rows]
        about["load at the end"] = f"{os.getloadavg()[0]:.2f}"
    for result in results:
        _plot(result, out)
    run = (
        f"`{_command(quick, rows, slices, rounds)}`: {bench.rounds} rounds, windows of "
        f"{bench.window_s:g} s,"
        f" {time.monotonic() - started:.0f} s in all."
    )
    if quick:
        run += " Quick figures show that it works; they are no measure."
    (out / "figures.json").write_text(as_json(about, run, results) + "\n")
    text = markdown(about, run, results)
    (out / "figures.md").write_text(text)
    click.echo(text)
    say(f"written to {out}")
    if failed := [result.name for result in results if result.error]:
        say(f"failed: {', '.join(failed)}")
        sys.exit(1)


def _command(quick: bool, rows: list[Row], slices: tuple[float, ...], rounds: int | None) -> str:
    """Return how to run the same again."""
    words = ["--quick"] * quick
    if len(rows) < len(ROWS):
        words += ["--rows", ",".join(row.name for row in rows)]
    if slices:
        words += ["--slices", ",".join(f"{slice_s * 1000:g}" for slice_s in slices)]
    if rounds:
        words += ["--rounds", str(rounds)]
    return " ".join(["tox -e bench", *(["--", *words] if words else [])])


def _plot(result: Result, out: Path) -> None:
    try:
        if (path := plots.plot(result, out)) is not None:
            result.notes.append(f"latencies: {path.name}")
    except ImportError as error:
        result.notes.append(f"no plot: {error}")


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """Have a private directory, with a path short enough for unix sockets."""
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir="/tmp"))
    os.environ["XDG_RUNTIME_DIR"] = str(directory)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Hide the developer's settings; only SHAREDPOOL_PG_BIN stays: it chooses the server."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(_OURS) and name != "SHAREDPOOL_PG_BIN":
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
