"""What the operator's guide shows of a leak is what happens."""

import os
import re
import sys
from pathlib import Path

import psycopg2

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support import documents
from tests.support.commands import address_of, sharedpool_command, start, who
from tests.support.processes import Piped


def transcript(section: str) -> tuple[str, list[str]]:
    """What the guide shows of an error, in one line, and the lines of its table."""
    (shown,) = documents.blocks(section, "")
    error, table = re.split(r"^\$ .*\n", shown, flags=re.MULTILINE)[1:]
    return " ".join(error.split()), table.splitlines()


def anonymous(text: str) -> str:
    """An error's text without what differs from run to run: pids, times, where the program lies."""
    return re.sub(
        r"\d+\.\d s", "N s", re.sub(r"\[\d+\]", "[N]", re.sub(r"/\S*/", "/", text))
    ).strip()


def test_the_transcript_in_the_operators_guide_is_what_happens(
    postgres: EphemeralPostgres, runtime_dir: Path, tmp_path: Path
) -> None:
    """Its program, run as it stands there, leads from the error to the line of code."""
    section = documents.section(documents.ON_CALL, "Who holds the connections?")
    (program,) = documents.blocks(section, "python")
    script = tmp_path / "shop.py"
    script.write_text(program)
    url = "postgresql:///?" + "&".join(
        f"{k}={v}" for k, v in psycopg2.extensions.parse_dsn(postgres.dsn).items()
    )
    with start("broker", "--max-conn", "2", "--dsn", postgres.dsn, "--ttl", "1.5") as process:
        address = address_of(process)
        environment = os.environ | {"SHAREDPOOL_BROKER": address, "DATABASE_URL": url}
        with Piped(sys.executable, str(script), env=environment) as shop:
            said = shop.line()
            guilty = next(n for n, line in enumerate(program.splitlines(), 1) if "get_conn" in line)
            assert "is exhausted" in said
            assert f"shop.py:{guilty} in price_of" in said
            assert section.count(f"shop.py:{guilty} in price_of") == 3  # as the guide has it
            told, table = transcript(section)
            assert anonymous(told) == anonymous(said)
            assert (
                table[0].split()
                == sharedpool_command("who", "--broker", address).stdout.splitlines()[0].split()
            )
            rows = who(address)
            assert [row["stack"][0].split("/")[-1] for row in rows] == [
                f"shop.py:{guilty} in price_of"
            ] * 2
            assert {row["server_state"] for row in rows} == {"idle in transaction"}
            assert {row["query"] for row in rows} == {"SELECT 7 AS price"}
            shop.tell_no_more()
        process.terminate()
        process.communicate()
