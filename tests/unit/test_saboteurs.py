"""The proof that the suite catches: its lists are complete, its table is right, and a sample of it is run for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unibus_contracts.saboteurs import __main__ as command
from unibus_contracts.saboteurs.base import Adapter, Hardship, Saboteur, hardship, saboteur
from unibus_contracts.saboteurs.gang import HARDSHIPS, SABOTEURS
from unibus_contracts.saboteurs.run import Trial, contracts
from unibus_contracts.saboteurs.table import hardships_borne, verdicts

# One for each way to break an adapter: sending, carrying, receiving, settling, places, telling.
SAMPLE = (
    "drops-the-hundredth",
    "strips-bodies",
    "ignores-the-limit",
    "acks-the-wrong-one",
    "lowers-names",
    "logs-the-password",
    "arrives-later",  # a hardship
)
CONTROL = Trial({"a.a": "passed", "b.b": "passed"}, "")


def one(*kills: str) -> Saboteur:
    return Saboteur("one", "It is broken.", kills, Adapter)


class TestGang:
    def test_at_least_sixty(self) -> None:
        assert len(SABOTEURS) >= 60

    def test_every_contract_is_meant_to_catch_one(self) -> None:
        """Whoever adds a contract adds the bug that it is there for."""
        assert set(contracts()) - {id for saboteur in SABOTEURS.values() for id in saboteur.kills} == set()

    def test_only_contracts_that_exist(self) -> None:
        assert {id for saboteur in SABOTEURS.values() for id in saboteur.kills} - set(contracts()) == set()

    def test_each_bug_is_another_one(self) -> None:
        assert len({saboteur.bug for saboteur in SABOTEURS.values()}) == len(SABOTEURS)

    @pytest.mark.parametrize(("bug", "kills"), [("No full stop", ("a.a",)), ("Nobody catches it.", ())])
    def test_refused(self, bug: str, kills: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match="one sentence"):
            saboteur(bug, *kills)


class TestHardships:
    HARD = (Hardship("hard", "It is hard.", ("a.a", "b.b"), Adapter),)

    def test_only_contracts_that_exist(self) -> None:
        assert {id for one in HARDSHIPS.values() for id in one.keeps} - set(contracts()) == set()

    def test_two_of_one_name(self) -> None:
        with pytest.raises(ValueError, match="two are called arrives-later"):
            hardship("It is another one.", "a.a")(type("ArrivesLater", (Adapter,), {}))

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match="one sentence"):
            hardship("No full stop", "a.a")

    def test_borne(self) -> None:
        table, wrong = hardships_borne(self.HARD, {"hard": Trial({"a.a": "passed", "b.b": "passed"}, "")})
        assert "to be borne: It is hard." in table[0]
        assert wrong == []

    @pytest.mark.parametrize("outcomes", [{"a.a": "passed", "b.b": "failed"}, {"a.a": "passed"}])
    def test_not_borne(self, outcomes: dict[str, str]) -> None:
        _, wrong = hardships_borne(self.HARD, {"hard": Trial(outcomes, "so it was said")})
        assert wrong == ["hard is not borne, by b.b", "so it was said"]


class TestVerdicts:
    def wrong(self, result: Trial, *kills: str, complete: bool = False) -> str:
        _, wrong = verdicts([one(*kills)], ["a.a", "b.b"], CONTROL, {"one": result}, ["b.b"], complete=complete)
        return "\n".join(wrong)

    def test_caught(self) -> None:
        result = Trial({"a.a": "failed", "b.b": "passed"}, "")
        table, wrong = verdicts([one("a.a")], ["a.a", "b.b"], CONTROL, {"one": result}, ["b.b"], complete=False)
        assert "    a.a" in table
        assert wrong == []

    def test_survived(self) -> None:
        assert "one is not caught by a.a" in self.wrong(Trial({"a.a": "passed", "b.b": "passed"}, ""), "a.a")

    def test_caught_by_another_one_only(self) -> None:
        assert "not caught by a.a" in self.wrong(Trial({"a.a": "passed", "b.b": "failed"}, ""), "a.a")

    def test_never_tried(self) -> None:
        said = self.wrong(Trial({}, "it did not start"), "a.a")
        assert "not caught by a.a" in said
        assert "it did not start" in said

    def test_breaks_everything(self) -> None:
        assert "breaks everything" in self.wrong(Trial({"a.a": "failed", "b.b": "failed"}, ""), "a.a")

    def test_a_contract_that_never_fails(self) -> None:
        result = Trial({"a.a": "failed", "b.b": "passed"}, "")
        assert "no saboteur is caught by b.b" in self.wrong(result, "a.a", complete=True)

    def test_a_sick_control(self) -> None:
        control = Trial({"a.a": "failed"}, "so it was said")
        result = Trial({"a.a": "failed", "b.b": "passed"}, "")
        _, wrong = verdicts([one("a.a")], ["a.a", "b.b"], control, {"one": result}, ["b.b"], complete=False)
        assert "a.a, b.b" in wrong[0]
        assert "so it was said" in wrong


class TestForReal:
    @pytest.mark.timeout(300)  # processes of pytest, on a machine that may be busy
    def test_a_sample_is_caught(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        ids = {id for name in SAMPLE if name in SABOTEURS for id in SABOTEURS[name].kills}
        path = tmp_path / "found.json"
        assert command.main([*SAMPLE, "--json", str(path)]) == 0, capsys.readouterr().out
        found = json.loads(path.read_text())
        assert {id for result in found.values() for id in result["caught_by"]} >= ids
        assert found["arrives-later"]["caught_by"] == []

    def test_an_unknown_name(self) -> None:
        with pytest.raises(SystemExit, match="nobody-knows"):
            command.main(["nobody-knows"])
