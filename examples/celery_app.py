"""Celery: four worker processes share two connections.

    $ python examples/celery_app.py

DATABASE_URL must name the database, such as postgresql://user:password@localhost:5432/app.

Starts the worker, as this command would:

    $ celery --workdir examples -A celery_app worker -c 4

Sends forty tasks to the worker. Prints how many were done, by how many processes, and the most
connections that the server had during a task, beside the limit. Then stops the worker, which takes
Celery some seconds. No message broker is needed: messages are files in a private folder in the
temporary directory.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import celery

import sharedpool
from sharedpool.integrations.celery import connect_signals

LIMIT, TASKS = 2, 40

folder = Path(tempfile.gettempdir(), f"sharedpool-celery-example-{os.getuid()}")
for part in ("messages", "control", "results"):
    (folder / part).mkdir(mode=0o700, parents=True, exist_ok=True)

app = celery.Celery(
    "celery_app", broker="filesystem://localhost", backend=(folder / "results").as_uri()
)
app.conf.broker_transport_options = {
    "data_folder_in": str(folder / "messages"),
    "data_folder_out": str(folder / "messages"),
    "control_folder": str(folder / "control"),
    "polling_interval": 0.05,
}

# This runs in Celery's main process, before it forks its workers. Configuring a pool connects to
# nothing: every worker process opens its own connections when its tasks ask for them. Prefork runs
# one task at a time in a process. With -P threads, pass
# pool_manager=sharedpool.ThreadedConnectionPool.
sharedpool.config_pool(max_conn=LIMIT, name="celery example")
# Optional: at the end, the processes close their connections a second earlier.
connect_signals()


@app.task
def look(number: int) -> tuple[int, int]:
    """Run a query. Return this process's id, and the number of the pool's connections."""
    with (
        sharedpool.get_pool("celery example").connection(timeout=30) as conn,
        conn.cursor() as cursor,
    ):
        cursor.execute(
            "SELECT count(*), pg_sleep(0.01) FROM pg_stat_activity WHERE application_name LIKE %s",
            ["sharedpool celery example [%"],
        )
        return os.getpid(), cursor.fetchone()[0]


def main() -> None:
    app.control.purge()  # an interrupted run may have left messages
    here = str(Path(__file__).parent)
    options = ["--quiet", "--workdir", here, "-A", "celery_app", "worker", "-c", "4"]
    worker = subprocess.Popen([sys.executable, "-m", "celery", *options, "-l", "WARNING"])
    try:
        outcomes = (
            celery.group(look.s(number) for number in range(TASKS))
            .delay()
            .get(timeout=60, interval=0.05)
        )
        processes, connections = zip(*outcomes, strict=True)
        print(f"{len(outcomes)} tasks done by {len(set(processes))} processes")
        print(f"most connections at a time: {max(connections)}, limit: {LIMIT}", flush=True)
    finally:
        worker.terminate()
        worker.wait()


if __name__ == "__main__":
    main()
