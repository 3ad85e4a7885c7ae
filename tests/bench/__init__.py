"""The benchmark: `tox -e bench`, or `python tests/bench [--quick] [--rows hit,select,...] [--out
DIR]`.

Every row measures sharedpool and its peers in turn in one run, several rounds long, on a PostgreSQL
that the run starts itself. It prints medians and ratios with their spread, writes `figures.json`,
`figures.md` and one plot for each row that has latencies, and asserts nothing about speed. The exit
status is 1 when a row could not be measured to its end.

`runner.py` takes the turns, `crew.py` has the processes, `peers.py` what they connect through,
`load.py` what they do, `report.py` and `stats.py` what comes of it; the rows are in `rows/`.
"""
