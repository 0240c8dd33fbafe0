"""The demo on memory://: its numbers add up, it says so when they don't, and its data is what its generator makes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from examples.orders.generate import DATA, expectations, write
from examples.orders.payments import Journal, PaymentFailed, Payments

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(240)  # whole runs in processes of their own, and the machine may be busy


def demo(*arguments: str | Path, url: str = "memory://") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.orders", *map(str, arguments), "--url", url]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UNIBUS_")}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)  # our own


def table(output: str) -> dict[str, tuple[int, int]]:
    """Row -> expected, actual."""
    rows = re.finditer(r"^ *(\S.*?) {2,}(\d+) +(\d+)", output, re.MULTILINE)
    return {row[1]: (int(row[2]), int(row[3])) for row in rows}


def test_the_numbers_of_the_whole_file_add_up() -> None:
    run = demo()
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    rows = table(run.stdout)
    assert len(rows) == 16
    assert {name: pair for name, pair in rows.items() if pair[0] != pair[1]} == {}
    assert rows["sent"] == (3000, 3000)
    assert "3000 of 3000 lines came to rest" in run.stdout
    assert "the numbers add up" in run.stdout


def test_a_wrong_expectation_is_said_and_gives_an_exit_status(tmp_path: Path) -> None:
    file = tmp_path / "orders.jsonl"
    write(file, 200, seed=2)
    expected = json.loads(expectations(file).read_text())
    expected["charged"] += 1
    expectations(file).write_text(json.dumps(expected))
    run = demo("--file", file)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "THE NUMBERS DO NOT ADD UP" in run.stdout
    assert [line.split()[0] for line in run.stdout.splitlines() if "differs" in line] == [
        "handled:",
        "billed",
        "shipped",
    ]


def test_an_earlier_run_is_continued_with_its_journal(tmp_path: Path) -> None:
    """All is sent once more, and no order is charged twice."""
    file, journal = tmp_path / "orders.jsonl", tmp_path / "journal"
    write(file, 300, seed=3)
    for _ in range(2):
        run = demo("--file", file, "--journal", journal, "--prefix", "again.")
        assert run.returncode == 0, run.stdout + run.stderr
    effects = Journal(journal)
    assert effects.repeated("charged") == 0
    assert effects.of("asked-again").total() > 0
    effects.close()


@pytest.mark.parametrize(
    ("arguments", "url", "status", "words"),
    [
        ((), "amqq://localhost", 2, "did you mean amqp://"),
        (("serve",), "memory://", 2, "name --prefix and --journal"),
        (("serve", "--prefix", "p.", "--journal", "j"), "memory://", 2, "memory:// ends with its process"),
        (("--file", "nowhere.jsonl"), "memory://", 2, "nowhere.expected.json"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: tuple[str, ...], url: str, status: int, words: str) -> None:
    run = demo(*arguments, url=url)
    assert run.returncode == status
    assert words in run.stderr
    assert "Traceback" not in run.stderr


def test_the_data_is_what_the_generator_makes(tmp_path: Path) -> None:
    write(tmp_path / DATA.name, 3000, seed=1)
    assert (tmp_path / DATA.name).read_bytes() == DATA.read_bytes()
    assert expectations(tmp_path / DATA.name).read_text() == expectations(DATA).read_text()


def test_the_service_names_no_broker() -> None:
    """The same code for each: no word of one in it."""
    text = (ROOT / "examples/orders/service.py").read_text().lower()
    for word in ("rabbit", "amqp", "aio_pika", "kafka", "sqs", "redis", "memory://"):
        assert word not in text


async def test_a_payment_is_taken_once_whichever_process_asks(tmp_path: Path) -> None:
    journals = [Journal(tmp_path / "journal") for _ in range(2)]
    first, second = map(Payments, journals)
    order = SimpleNamespace(id="o-1", payment="flaky-card")
    with pytest.raises(PaymentFailed):
        await first.charge(order)
    await second.charge(order)
    await first.charge(order)
    for journal in journals:
        journal.read()
        assert {what: journal.of(what).total() for what in ("charged", "asked-again", "retried")} == {
            "charged": 1,
            "asked-again": 1,
            "retried": 1,
        }
        journal.close()


def test_a_journal_line_that_is_not_whole_waits(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"charged o-1\nchar")
    journal = Journal(path)
    assert journal.lines == 1
    with path.open("ab") as file:
        file.write(b"ged o-2\n")
    journal.read()
    assert sorted(journal.of("charged")) == ["o-1", "o-2"]
    journal.close()
