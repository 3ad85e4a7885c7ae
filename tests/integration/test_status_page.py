"""The status page in a real browser: what it shows, that it lives, and that what others call
themselves stays text."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.broker_process import Broker, running
from tests.support.browser import PROGRAM, Page, browsing
from tests.support.processes import Piped, Worker
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium: apt-get install chromium")

MARKUP = "<img src=x onerror=alert(1)>"
# A process with a name, a thread and a pool that would be markup.
STRANGER = """
import sys, threading
import sharedpool
dsn, broker, markup = sys.argv[1:]
def hold():
    conn = pool.get_conn(timeout=20)
    print("held", flush=True)
    sys.stdin.readline()
    pool.put_conn(conn)
pool = sharedpool.config_pool(
    dsn=dsn, broker=broker, name=markup, max_conn=2, pool_manager=sharedpool.ThreadedConnectionPool
)
thread = threading.Thread(target=hold, name=markup)
thread.start()
thread.join()
pool.release_all()
"""


@pytest.fixture(scope="module")
def served(postgres: EphemeralPostgres) -> Iterator[Broker]:
    directory = Path(tempfile.mkdtemp(prefix="spm-", dir="/tmp"))
    with running(postgres.dsn, directory) as broker:
        yield broker
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def page(served: Broker) -> Iterator[Page]:
    """The page, opened once; `complaints` are looked at by the last test."""
    directory = Path(tempfile.mkdtemp(prefix="spw-", dir="/tmp"))
    with browsing(directory) as browser:
        yield Page(browser, f"http://127.0.0.1:{served.port}/")
    shutil.rmtree(directory, ignore_errors=True)  # what it has started may still be writing there


def text(page: Page, selector: str = "body") -> str:
    found: str = page.evaluate(f"document.querySelector({selector!r})?.innerText ?? ''")
    return found


def test_it_shows_the_limits_the_leases_and_who_has_them_as_they_change(
    page: Page, served: Broker, postgres: EphemeralPostgres
) -> None:
    wait_until(
        lambda: f"broker {served.process.pid} at {served.address}" in text(page, "#broker"),
        timeout_s=30,
    )
    with Worker(
        dsn=postgres.dsn, broker=served.address, name="shop", max_conn=3, threads=True
    ) as worker:
        worker.ask("get", name="a", timeout=20)
        backend = worker.ask("get", name="b", timeout=20)["backend"]
        # No reload: the page asks by itself.
        wait_until(lambda: "2 of 3" in text(page, ".pool"), timeout_s=20)
        assert text(page, ".pool h2").startswith("shop")
        wait_until(
            lambda: "MainThread" in text(page, "#leases"), timeout_s=20
        )  # told by the heartbeat
        assert f"worker.py[{worker.pid}]" in text(page, "#leases")
        assert str(backend) in text(page, "#leases")
        assert "worker.py" in text(page, "#sessions")
        assert page.evaluate("document.querySelectorAll('#leases tbody tr').length") == 2
        assert (
            page.evaluate("document.querySelector('.chart title').textContent")
            == "2 of 3 in use now"
        )
        worker.ask("put", name="a")
        wait_until(lambda: "1 of 3" in text(page, ".pool"), timeout_s=20)
        worker.ask("put", name="b")
    wait_until(lambda: "shop" not in text(page, "#pools"), timeout_s=20)


def test_names_of_other_programs_are_shown_as_text(
    page: Page, served: Broker, postgres: EphemeralPostgres, tmp_path: Path
) -> None:
    script = tmp_path / f"{MARKUP}.py"
    script.write_text(STRANGER)
    with ExitStack() as stack:
        stranger = stack.enter_context(
            Piped(sys.executable, str(script), postgres.dsn, served.address, MARKUP)
        )
        stack.callback(stranger.communicate)
        assert stranger.line() == "held"
        for place in ("#pools", "#leases", "#sessions"):
            wait_until(
                lambda place=place: MARKUP in text(page, place),
                timeout_s=20,
                what=f"the name in {place}",
            )
        wait_until(
            lambda: text(page, "#leases").count(MARKUP) == 3,
            timeout_s=20,
            what="pool, process and thread",
        )
        assert page.evaluate("document.querySelectorAll('main img').length") == 0


def test_the_policy_lets_nothing_run_that_is_not_the_pages_own(page: Page) -> None:
    page.evaluate(
        "document.addEventListener('securitypolicyviolation', event => window.refused = "
        "event.effectiveDirective)"
    )
    page.evaluate(f"document.querySelector('footer').insertAdjacentHTML('beforeend', {MARKUP!r})")
    assert wait_until(lambda: page.evaluate("window.refused")) in ("img-src", "script-src-attr")
    page.evaluate("document.querySelector('footer img').remove()")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark(page: Page, scheme: str) -> None:
    page.prefer(scheme)
    contrast = """
        (() => {
          const channels = (css) => css.match(/[\\d.]+/g).slice(0, 3).map((value) => value / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
          const light = (css) => {
            const [r, g, b] = channels(css);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const paper = getComputedStyle(document.body).backgroundColor;
          return ["body", "#broker", "h2 span", "footer a"].map((selector) => {
            const ink = getComputedStyle(document.querySelector(selector)).color;
            const pair = [light(ink), light(paper)];
            return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
          });
        })()
    """
    assert min(page.evaluate(contrast)) >= 4.5  # as WCAG 2 asks (AA)
    paper = [
        int(value)
        for value in page.evaluate("getComputedStyle(document.body).backgroundColor")[4:-1].split(
            ","
        )
    ]
    assert (max(paper) < 60) == (scheme == "dark")


def test_it_says_when_the_broker_is_gone(
    postgres: EphemeralPostgres, runtime_dir: Path, tmp_path: Path
) -> None:
    with browsing(tmp_path) as browser:
        with running(postgres.dsn, runtime_dir) as served:
            page = Page(browser, f"http://127.0.0.1:{served.port}/")
            wait_until(lambda: "epoch" in text(page, "#broker"), timeout_s=30)
            assert page.evaluate("document.querySelector('#trouble').hidden")
            assert page.complaints == []  # nothing of its own was refused, nothing raised
        wait_until(lambda: "no news since" in text(page, "#trouble"), timeout_s=20)
