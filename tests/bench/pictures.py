"""Draw the contended rows of this folder's README: `python tests/bench/pictures.py`."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
PICTURE = HERE.parents[1] / "examples" / "pictures" / "contended.svg"

_RATIO = re.compile(r"([\d.]+) ×(?:, p99 ([\d.]+) ×)?")
_GREEN, _ORANGE, _GREY = "#2e7d32", "#ef6c00", "#607d8b"
_BAR, _GAP, _TOP, _BASE = 46, 34, 86, 300
_PANELS = (40, 560)  # where each begins


class Bar(NamedTuple):
    """One situation, as a multiple of PgBouncer's figure."""

    label: str
    ratio: float


def contended(text: str) -> tuple[list[Bar], list[Bar]]:
    """Return the throughputs and the p99s of the rows in which processes take turns without a
    pause."""
    throughputs: list[Bar] = []
    latencies: list[Bar] = []
    for label, throughput, p99 in _ratios(text):
        throughputs.append(Bar(label, float(throughput)))
        if p99:
            latencies.append(Bar(label, float(p99)))
    return throughputs, latencies


def _ratios(text: str) -> Iterator[tuple[str, str, str]]:
    lines = text.splitlines()
    first = next(
        at
        for at, line in enumerate(lines)
        if line.startswith("| 32 processes on 8 slots, no pause")
    )
    thirty_two, others, alone, networks = (
        _RATIO.findall(line.split("|")[-2]) for line in lines[first : first + 4]
    )
    labels = ("16", "32", "64", "32, no hand-over", "32, TCP", "32, TLS")
    found = [others[0], thirty_two[0], others[1], alone[0], networks[0], networks[1]]
    for label, (throughput, p99) in zip(labels, found, strict=True):
        yield label, throughput, p99


def draw(throughputs: Sequence[Bar], latencies: Sequence[Bar]) -> str:
    """Return the SVG."""
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 372" role="img" '
            'aria-labelledby="title"'
            ' font-family="Helvetica, Arial, sans-serif" font-size="14">',
            '<title id="title">8 connections in turns of a millisecond: sharedpool as a multiple '
            "of PgBouncer</title>",
            '<rect width="860" height="372" rx="10" fill="#ffffff"/>',
            '<text x="40" y="32" font-size="17" font-weight="bold">'
            "8 connections in turns of a millisecond, × PgBouncer in transaction mode</text>",
            *_panel(_PANELS[0], "throughput (higher is better)", throughputs, 1.5, _GREEN),
            *_panel(_PANELS[1], "p99 of a turn (lower is better)", latencies, 3.5, _ORANGE),
            "</svg>",
            "",
        ]
    )


def _panel(left: int, title: str, bars: Sequence[Bar], most: float, colour: str) -> Iterator[str]:
    width = len(bars) * (_BAR + _GAP)
    scale = (_BASE - _TOP) / most
    yield f'<text x="{left}" y="62">{title}</text>'
    for at, bar in enumerate(bars):
        x, height = left + at * (_BAR + _GAP) + _GAP // 2, round(bar.ratio * scale)
        middle = x + _BAR // 2
        top = _BASE - height
        yield f'<rect x="{x}" y="{top}" width="{_BAR}" height="{height}" fill="{colour}"/>'
        yield f'<text x="{middle}" y="{top - 6}" text-anchor="middle">{bar.ratio:g} ×</text>'
        for line, part in enumerate(bar.label.split(", ")):
            below = _BASE + 20 + 18 * line
            yield f'<text x="{middle}" y="{below}" text-anchor="middle">{part}</text>'
    yield f'<line x1="{left}" y1="{_BASE}" x2="{left + width}" y2="{_BASE}" stroke="{_GREY}"/>'
    level = _BASE - round(scale)
    yield (
        f'<line x1="{left}" y1="{level}" x2="{left + width}" y2="{level}" stroke="{_GREY}" '
        'stroke-width="2"'
        ' stroke-dasharray="6 4"/>'
    )
    yield f'<text x="{left}" y="{_BASE + 62}" fill="{_GREY}">processes; dashed: PgBouncer</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(*contended(README.read_text())))
