"""The demo side by side: what is the same is said to be, what differs is found, and what may differ is marked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from examples.orders.everywhere import AGAIN, DECLARED, SECONDS, Numbers, differences, main
from examples.orders.generate import expectations, write

pytestmark = pytest.mark.timeout(240)  # whole runs in processes of their own, and the machine may be busy


def numbers(expected: Mapping[str, float] | None = None, again: float = 0, **actual: float) -> Numbers:
    return Numbers(
        expected or {"sent": 3, "billed": 2}, {"sent": 3, "billed": 2, AGAIN: again, SECONDS: again, **actual}
    )


def test_only_what_is_declared_may_differ() -> None:
    assert set(DECLARED) == {AGAIN, SECONDS}
    assert differences({"a": numbers(), "b": numbers(again=7)}) == {}


@pytest.mark.parametrize(
    ("other", "rows"),
    [
        (numbers(billed=1), {"billed"}),
        (numbers(more=1), {"more"}),
        (numbers({"sent": 3}), {"billed"}),
        (numbers({"sent": 4, "billed": 2}, sent=4), {"sent"}),
    ],
)
def test_a_number_that_is_not_the_same_is_found(other: Numbers, rows: set[str]) -> None:
    found = differences({"a": numbers(), "b": other})
    assert set(found) == rows
    assert all("b" in names for names in found.values())


def test_all_may_be_equal_and_wrong() -> None:
    assert differences({"a": numbers(sent=2), "b": numbers(sent=2)}) == {"sent": {"a", "b"}}


def test_two_brokers_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "orders.jsonl"
    write(file, 200, seed=2)
    assert main(["memory://", "memory://", "--file", str(file)]) == 0
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if "expected" in line)
    assert header.split("\u2503")[2:-1] == [" expected ", " memory ", " memory 2 "]
    row = next(line for line in printed.splitlines() if "dead-lettered" in line)
    assert len({cell.strip() for cell in row.split("\u2502")[2:-1]}) == 1
    assert f"{SECONDS}*" in printed
    assert f"* {SECONDS} may differ" in printed
    assert "the numbers are the same on 2 brokers" in printed


def test_a_number_that_differs_is_shown_and_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "orders.jsonl"
    write(file, 200, seed=2)
    expected = json.loads(expectations(file).read_text())
    expected["charged"] += 1
    expectations(file).write_text(json.dumps(expected))
    assert main(["memory://", "--file", str(file)]) == 1
    printed = capsys.readouterr().out
    assert "billed: differs on memory" in printed
    assert "THE NUMBERS ARE NOT THE SAME EVERYWHERE" in printed


def test_a_broker_that_is_not_there_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere://localhost"]) == 1
    assert "nowhere: failed" in capsys.readouterr().out
