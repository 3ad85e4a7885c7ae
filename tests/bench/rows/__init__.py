"""The rows, in the order of the table: one module for each family."""

from tests.bench.rows import broker, contended, hit, ledger, queries, recall, rest, storm, uneven

ROWS = (
    *hit.ROWS,
    *queries.ROWS,
    *contended.ROWS,
    *uneven.ROWS,
    *recall.ROWS,
    *broker.ROWS,
    *ledger.ROWS,
    *rest.ROWS,
    *storm.ROWS,
)
