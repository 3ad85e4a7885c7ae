"""Plot the latency distributions of a row."""

from pathlib import Path

from tests.bench.report import Result
from tests.bench.stats import curve


def plot(result: Result, directory: Path) -> Path | None:
    """Write a row's latency distributions as NAME.png and return its path; None when it has none.

    Raises ImportError without matplotlib.
    """
    drawn = {who: each for who, each in result.latencies_ms.items() if each}
    if not drawn:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for who, latencies_ms in drawn.items():
        steps = curve(latencies_ms)
        # From the top: the tail is what one looks for, and logarithms show it.
        axes.plot(
            [value for value, _ in steps], [max(1 - share, 1e-4) for _, share in steps], label=who
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="latency, ms",
        ylabel="share that takes longer",
        title=result.title,
    )
    axes.set_ylim(1e-3, 1)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    path = directory / f"{result.name}.png"
    figure.savefig(path, dpi=120)
    return path
