"""Pinned answers: a run that differs from them says in what."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from unibus.adapter import Endpoint, Url
from unibus.clock import SystemClock
from unibus.memory import MemoryAdapter
from unibus_contracts import pins, report
from unibus_contracts.kit import _as_dict
from unibus_contracts.saboteurs.run import contracts


def run(**outcomes: str) -> dict[str, Any]:
    """A report of these contracts, `a_b` for `a.b`."""
    known = {
        id.replace("_", "."): {
            "id": id.replace("_", "."),
            "promise": "It works.",
            "chapter": "x",
            "capability": "delay",
        }
        for id in outcomes
    }
    told = {
        "adapter": "mine",
        "version": "8.2.1",
        "features": {"delay": {"level": "native", "how": "", "limit": 900.0}},
        "numbers": {"max_body": 1024},
    }
    found = {id.replace("_", "."): (outcome, 0.1) for id, outcome in outcomes.items() if outcome != report.NOT_RUN}
    return report.build("memory://", known, found, told)


@pytest.fixture
def pinned(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(run(a_one="passed", a_two="refused-as-declared", a_three="not-tried")))
    assert pins.main([str(path), "--folder", str(tmp_path / "answers")]) == 0
    return tmp_path / "answers"


class TestDifferences:
    def test_none(self, pinned: Path) -> None:
        assert pins.differences(pinned, run(a_one="passed", a_two="refused-as-declared", a_three="not-tried")) == []

    def test_of_a_part_only_the_part_is_compared(self, pinned: Path) -> None:
        assert pins.differences(pinned, run(a_one="passed", a_two="not-run")) == []

    def test_a_contract_that_is_now_refused(self, pinned: Path) -> None:
        lines = pins.differences(pinned, run(a_one="refused-as-declared", a_two="refused-as-declared"))
        assert lines[0] == "a.one: pinned kept, now refused"
        assert "python -m unibus_contracts.pins --folder" in lines[-1]

    def test_a_new_contract(self, pinned: Path) -> None:
        lines = pins.differences(pinned, run(a_one="passed", a_two="refused-as-declared", a_new="passed"))
        assert lines[0] == "a.new: pinned not at all, now kept"

    def test_a_contract_that_has_gone_or_failed(self, pinned: Path) -> None:
        lines = pins.differences(pinned, run(a_one="failed"))
        assert lines[:2] == [
            "a.one: pinned kept, and did not pass now",
            "a.two: pinned refused, and did not pass now",
        ]

    def test_features_and_numbers(self, pinned: Path) -> None:
        now = copy.deepcopy(run(a_one="passed", a_two="refused-as-declared"))
        now["features"]["delay"]["level"] = "refused"
        now["numbers"] = {"max_body": 2048, "max_key": 10}
        lines = pins.differences(pinned, now)
        assert len(lines) == 4
        assert lines[0].startswith('delay: pinned {"level": "native"')
        assert lines[1:3] == ["max_body: pinned 1024, now 2048", "max_key: pinned null, now 10"]

    def test_nothing_pinned(self, tmp_path: Path) -> None:
        (line,) = pins.differences(tmp_path, run(a_one="passed"))
        assert "mine.json is missing" in line

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"features": 1, "numbers": {}, "contracts": {}}'])
    def test_a_broken_pin(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "mine.json").write_text(text)
        (line,) = pins.differences(tmp_path, run(a_one="passed"))
        assert "holds no pinned answers" in line

    def test_answers_of_a_version_go_first(self, pinned: Path) -> None:
        (pinned / "mine-8.2.json").write_text((pinned / "mine.json").read_text().replace("1024", "512"))
        lines = pins.differences(pinned, run(a_one="passed", a_two="refused-as-declared"))
        assert lines[0] == "max_body: pinned 512, now 1024"

    def test_a_version_that_is_not_pinned_beside_one_that_is(self, pinned: Path) -> None:
        """Answers of another version are no measure: nothing is compared, and the summary says so."""
        (pinned / "mine.json").rename(pinned / "mine-7.0.json")
        other = run(a_one="refused-as-declared")
        assert pins.differences(pinned, other) == []
        assert pins.unpinned(pinned, other) == "nothing is pinned of mine 8.2, so nothing was compared; pinned: 7.0"
        (pinned / "mine-7.0.json").rename(pinned / "mine-8.2.json")
        assert pins.unpinned(pinned, other) is None
        assert pins.differences(pinned, other)

    def test_an_adapter_that_was_never_reached(self, pinned: Path) -> None:
        assert pins.differences(pinned, report.build("x://", {}, {}, None)) == []


class TestPinning:
    def test_by_version(self, tmp_path: Path) -> None:
        path = tmp_path / "report.json"
        path.write_text(json.dumps(run(a_one="passed")))
        assert pins.main([str(path), "--by-version", "--folder", str(tmp_path)]) == 0
        assert (tmp_path / "mine-8.2.json").exists()

    def test_only_whole_passes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        paths = []
        for n, outcomes in enumerate(({"a_one": "failed"}, {"a_one": "passed", "a_two": "not-run"})):
            paths.append(tmp_path / f"{n}.json")
            paths[-1].write_text(json.dumps(run(**outcomes)))
        paths.append(tmp_path / "none.json")
        assert pins.main([*map(str, paths), "--folder", str(tmp_path / "answers")]) == 1
        assert not (tmp_path / "answers").exists()
        said = capsys.readouterr().err
        assert "a.one: It works." in said
        assert "a.two was not run" in said
        assert "no report of the contract suite" in said


@pytest.mark.parametrize("path", sorted(pins.ANSWERS.glob("*.json")), ids=lambda path: path.stem)
def test_a_pin_answers_the_whole_suite(path: Path) -> None:
    """Who adds a contract runs it, and pins what comes out. A server is restarted by a test of its own (`test_contracts_restart`)."""
    restarts = set() if path.stem == "memory" else {id for id in contracts() if id.startswith("fault.restart_")}
    assert set(json.loads(path.read_text())["contracts"]) == set(contracts()) - restarts


def test_the_memory_adapter_is_pinned() -> None:
    """Its capabilities are compared here; a whole run compares its contracts too."""
    pinned = json.loads((pins.ANSWERS / "memory.json").read_text())
    now = _as_dict(MemoryAdapter(Endpoint(Url("memory"), "svc", "1", SystemClock())).capabilities)
    assert {name: pinned[name] for name in now} == json.loads(json.dumps(now))
