"""Take the picture of the status page: `python -m tests.support.page_picture`, two minutes.

It needs Chromium. The page is that of a real broker, with the processes of a small shop at work.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.broker_process import running
from tests.support.browser import PROGRAM, Page, browsing

PICTURE = Path(__file__).resolve().parents[2] / "examples" / "pictures" / "page.png"
RUNS_S = 110  # the chart shows the last half hour, a point every two seconds

# A program of the shop: how long it uses a connection, and how long it pauses, in turn.
PROGRAM_TEXT = """
import random, sys, time
import sharedpool
dsn, broker, name, use_s, pause_s, seed = sys.argv[1:]
chance, pool = random.Random(int(seed)), sharedpool.config_pool(
    dsn=dsn, broker=broker, name=name, max_conn={limit}, timeout=30
)
began = time.monotonic()
while True:
    busy = 1 + 3 * (30 < time.monotonic() - began < 75)  # a busy time
    with pool.connection() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", (chance.expovariate(1 / float(use_s)),))
    time.sleep(chance.expovariate(busy / float(pause_s)))
"""
# Name of the program, its pool and the pool's limit, how many, use and pause in seconds.
SHOP = (
    ("web.py", "shop", 8, 10, 0.1, 0.2),
    ("mailer.py", "shop", 8, 1, 0.5, 2.0),
    ("report.py", "reports", 2, 2, 4.0, 3.0),
)


def main() -> None:
    """Write the picture."""
    if PROGRAM is None:
        raise SystemExit("no Chromium: apt-get install chromium")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shop-")))
        profile = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="spw-", ignore_cleanup_errors=True)
        )
        postgres = stack.enter_context(EphemeralPostgres(tcp=True))
        broker = stack.enter_context(running(postgres.dsn, directory))
        page = Page(
            stack.enter_context(browsing(Path(profile))), f"http://127.0.0.1:{broker.port}/"
        )
        for program, pool, limit, count, *times in SHOP:
            script = directory / program
            script.write_text(PROGRAM_TEXT.format(limit=limit))
            for seed in range(count):
                arguments = [postgres.dsn, broker.address, pool, *map(str, times), str(seed)]
                process = subprocess.Popen([sys.executable, str(script), *arguments])
                stack.callback(process.wait)
                stack.callback(process.kill)
        time.sleep(RUNS_S)
        page.prefer("light")
        page.call("Emulation.setScrollbarsHidden", hidden=True)
        page.screenshot(PICTURE, width=1100, height=1150)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
