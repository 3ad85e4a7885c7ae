"""Turn what a run of the fault tests has measured into a table: `python tests/faults/report.py
DIR`."""

import json
import sys
from pathlib import Path
from typing import Any

# As the rows are wanted in the table, those of one host first; one that is not named comes last.
ONE_HOST = (
    "sigkill", "sigstop", "broker-sigkill", "broker-sigstop", "proxy", "restart", "terminate",
    "fork", "second-broker", "too-small", "expiry", "recall", "behind-haproxy", "behind-stunnel",
    "behind-socat", "behind-late-closer", "behind-pgbouncer", "soak",
)  # fmt: skip
SEVERAL_HOSTS = (
    "host-killed", "host-without-power", "host-frozen", "host-paused", "host-cut-off",
    "host-broker-killed", "host-broker-frozen", "host-joins-and-leaves", "hosts-restart-fast",
    "hosts-restart-immediate", "hosts-failover",
)  # fmt: skip
ORDER = ONE_HOST + SEVERAL_HOSTS


def load(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the variants of every row, in the table's order."""
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    names = sorted({row["name"] for row in found}, key=lambda name: (*ORDER, name).index(name))
    return {
        name: sorted((r for r in found if r["name"] == name), key=lambda r: r["variant"])
        for name in names
    }


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return the Markdown table: one line a row, the worse of its variants."""
    lines = ["| fault | goal | measured | overshoot | leaked slots |", "|---|---|---|---|---|"]
    for variants in rows.values():
        worse = max(variants, key=lambda row: (not row["passed"], row["worst"]))
        overshoot, leaked = (
            _worst([row[what] for row in variants]) for what in ("overshoot", "leaked")
        )
        lines.append(
            f"| {worse['fault']} | {worse['goal']} | {_measured(worse)} | {overshoot} | {leaked} |"
        )
    return "\n".join(lines)


def footnotes(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return what the table does not say: the sums, what is missing, the seeds of
    whatever failed."""
    every = [row for variants in rows.values() for row in variants]
    short = sum(not row["long"] for row in every)
    # The two kinds are run apart from each other: what has no row at all was not meant to be run.
    kinds: list[tuple[str, ...]] = [ONE_HOST, SEVERAL_HOSTS]
    meant = [name for kind in kinds if rows.keys() & set(kind) for name in kind]
    missing = [name for name in meant if name not in rows]
    lines = [
        f"{sum(row['passed'] for row in every)} of {len(every)} runs passed;"
        f" {sum(row['faults'] for row in every)} faults, "
        f"{sum(row['checkouts'] for row in every)} checkouts,"
        f" {sum(row['backends'] for row in every)} backends; connections used twice at a time:"
        f" {sum(row['double_use'] or 0 for row in every)}; most backends at once:"
        f" {max((row['peak_by_log'] or 0 for row in every), default=0)} by the server's log,"
        f" {max((row['peak_by_sampler'] or 0 for row in every), default=0)} by pg_stat_activity."
    ]
    both = [name for name, variants in rows.items() if len(variants) > 1]
    if both:
        lines.append(
            "Also with PostgreSQL's own limit on the role, the worse figure shown: "
            f"{', '.join(both)}."
        )
    modes = " and ".join(sorted({row["handover"] for row in every}))
    lines.append(
        f"Hand-over {modes}: a backend went from one worker to another "
        f"{sum(r['moves'] for r in every)} times."
    )
    seconds = sum(float(row["figures"].get("duration_s", 0)) for row in every)
    lines.append(f"They took {seconds / 60:.1f} minutes.")
    if short:
        lines.append(f"{short} of them were short runs: their figures are no measure.")
    if missing:
        lines.append(f"Not run: {', '.join(missing)}.")
    lines += [
        f"FAILED: {row['name']} {row['variant'] or 'without the limit'}: "
        f"SHAREDPOOL_FAULTS_SEED={row['seed']}"
        for row in every
        if not row["passed"]
    ]
    return "\n".join(lines)


def _measured(row: dict[str, Any]) -> str:
    """Return the row's figures. One that failed before it had any says so."""
    return (row["measured"] or "nothing") + ("" if row["passed"] else " **(failed)**")


def _worst(values: list[int | None]) -> str:
    """Return the greatest; with a `?` when a variant did not come to count: it may
    have been worse."""
    known = [value for value in values if value is not None]
    return (str(max(known)) if known else "") + "?" * (len(known) < len(values))


def main() -> int:
    """Print the report; the exit status is 0 if there is one and every run in it has passed."""
    rows = load(Path(sys.argv[1]))
    print(table(rows))
    print()
    print(footnotes(rows))
    return 0 if rows and all(row["passed"] for variants in rows.values() for row in variants) else 1


if __name__ == "__main__":
    sys.exit(main())
