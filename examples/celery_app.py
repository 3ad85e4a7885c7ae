"""Celery: four worker processes share two connections. Needs no message broker, only PostgreSQL.

    $ python examples/celery_app.py

DATABASE_URL says where PostgreSQL is: export
DATABASE_URL=postgresql://user:password@localhost:5432/app

Starts the worker as you would with

    $ celery --workdir examples -A celery_app worker -c 4

hands it forty tasks, prints how many were done, by how many processes, and the most connections
that the server had while a task looked, beside the limit; then stops the worker, for which Celery
takes some seconds. Messages go through files in a folder of your own under the system's temporary
directory.
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

# In Celery's main process, before it forks its workers: to configure connects to nothing, and every
# worker process opens its own connections when its tasks ask for them. Prefork runs one task at a
# time in a process; with -P threads pass pool_manager=sharedpool.ThreadedConnectionPool.
sharedpool.config_pool(max_conn=LIMIT, name="celery example")
# may be left out; it has the processes close their connections a second sooner at the end
connect_signals()


@app.task
def look(number: int) -> tuple[int, int]:
    """Work a little in the database; return the process that did, and the pool's connections on
    the server.
    """
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
    app.control.purge()  # what an earlier run may have left
    here = str(Path(__file__).parent)
    command = [
        "celery",
        "--quiet",
        "--workdir",
        here,
        "-A",
        "celery_app",
        "worker",
        "-c",
        "4",
        "-l",
        "WARNING",
    ]
    worker = subprocess.Popen([sys.executable, "-m", *command])
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
