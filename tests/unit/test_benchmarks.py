"""What benchmarks compute from their samples. Nothing here measures time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks import floor, growth, page
from benchmarks.cases import TOOL, Case
from benchmarks.flows import LEAST, fitting, rotated
from benchmarks.goals import Goal, bottleneck
from benchmarks.load import STEP, Miscount, body
from benchmarks.page import BLOCKS, PAGE, Runs, fill
from benchmarks.tools import consumed
from benchmarks.watch import Watch
from benchmarks.workers import together


def rates(name: str, base: str | None, **rounds: Any) -> Case:
    """A case of throughput; `_` in a name stands for a space."""
    case = Case(name, base)
    for contestant, found in rounds.items():
        for rate in found:
            case.add(contestant.replace("_", " "), {"messages/s": rate, "CPU µs/message": 1e6 / rate, "busy %": 50.0})
    return case


def run(*cases: Case, **more: Any) -> dict[str, Any]:
    about = {
        "date": "2026-11-22T13:55:00+00:00",
        "commit": "abc1234",
        "cpu": "a CPU",
        "cores": 2,
        "load": [0.1, 0.2, 0.3],
    }
    versions: dict[str, Any] = {"python": "3.11.7", "packages": {"unibus": "0.1.0", "redis": "8.1.0"}}
    brokers = {"brokers": {"redis": {"version": "7.0.15", "source": "native"}}}
    return {**about, **versions, **brokers, "cases": [case.as_json() for case in cases], "growth": [], **more}


def test_ratios_are_taken_round_by_round() -> None:
    found = rates("Redis: send", "raw", unibus=[100, 10, 300], raw=[50, 20, 100]).as_json()
    ratio = found["contestants"]["unibus"]["messages/s"]["to"]["raw"]
    assert ratio == {"median": 2.0, "lowest": 0.5, "highest": 3.0}


def test_a_ratio_has_fallen_when_its_whole_range_lies_below_the_floor() -> None:
    before = floor.of(run(rates("Redis: send", "raw", unibus=[20, 21, 22], raw=[10, 10, 10])))
    assert [(own["to"], own["lowest"], own["highest"]) for own in before["ratios"]] == [("raw", 2.0, 2.2)]
    touching = run(rates("Redis: send", "raw", unibus=[15, 18, 20], raw=[10, 10, 10]))
    assert floor.fallen(touching, before) == ([], 1)
    lines, compared = floor.fallen(run(rates("Redis: send", "raw", unibus=[15, 18, 19], raw=[10, 10, 10])), before)
    assert compared == 1
    assert lines == ["Redis: send, messages/s, unibus to raw: 1.8 (1.5 - 1.9); the floor is 2.1 (2.0 - 2.2)"]


def test_a_latency_has_fallen_when_it_rose() -> None:
    def latency(*milliseconds: float) -> dict[str, Any]:
        case = Case("Redis: request and reply, one at a time", "raw")
        for own in milliseconds:
            case.add("unibus", {"p50 ms": own, "p99 ms": 50.0})
            case.add("raw", {"p50 ms": 1.0, "p99 ms": 5.0})
        return run(case)

    before = floor.of(latency(1.0, 1.2))
    assert [own["figure"] for own in before["ratios"]] == ["p50 ms"]
    assert floor.fallen(latency(0.5, 0.6), before) == ([], 1)
    assert floor.fallen(latency(1.2, 1.5), before) == ([], 1)
    assert len(floor.fallen(latency(1.3, 1.5), before)[0]) == 1


def test_what_only_one_run_has_is_not_compared_and_tools_are_no_floor() -> None:
    sends = rates("Redis: send", "raw", unibus=[20], raw=[10])
    sends.add(TOOL, {"messages/s": 99.0})
    before = floor.of(run(sends))
    assert [own["to"] for own in before["ratios"]] == ["raw"]
    assert floor.fallen(run(rates("Kafka: send", "raw", unibus=[1], raw=[10])), before) == ([], 0)


def test_other_versions_than_those_of_the_floor_are_named() -> None:
    before = floor.of(run(rates("Redis: send", "raw", unibus=[20], raw=[10])))
    now = run(rates("Redis: send", "raw", unibus=[20], raw=[10]))
    assert floor.differences(now, before) == []
    now["brokers"]["redis"]["version"] = "8.0.0"
    now["packages"]["redis"] = "9.0.0"
    assert floor.differences(now, before) == [
        "redis is 8.0.0, the floor was measured with 7.0.15",
        "redis is 9.0.0, the floor was measured with 8.1.0",
    ]


def test_a_floor_is_read_from_a_run_or_a_floor(tmp_path: Path) -> None:
    import json

    whole = run(rates("Redis: send", "raw", unibus=[20], raw=[10]))
    (tmp_path / "run.json").write_text(json.dumps(whole))
    (tmp_path / "floor.json").write_text(json.dumps(floor.of(whole)))
    assert floor.read(tmp_path / "run.json") == floor.read(tmp_path / "floor.json") == floor.of(whole)


def test_the_committed_floor_can_be_compared_with() -> None:
    found = floor.read(floor.FLOOR)
    assert found["brokers"]
    assert all(own["lowest"] <= own["median"] <= own["highest"] for own in found["ratios"])
    assert {own["figure"] for own in found["ratios"]} <= floor.FIGURES.keys()


def test_a_goal_is_judged_by_the_median() -> None:
    runs = Runs([run(rates("Redis: send", "raw", unibus=[10, 15, 40], raw=[10, 10, 10]))])
    found = Goal("Redis: send", "raw", 1.5).found(runs.cases)
    assert found is not None
    assert Goal("Redis: send", "raw", 1.5).reached(found)
    assert not Goal("Redis: send", "raw", 1.6).reached(found)
    assert not Goal("Redis: send", "raw", 1.4, at_most=True).reached(found)
    assert Goal("Redis: send", "somebody else", 1.5).found(runs.cases) is None
    assert Goal("Kafka: send", "raw", 1.5).found(runs.cases) is None


@pytest.mark.parametrize(
    ("busy", "fastest", "who"),
    [(90.0, 500.0, "unibus"), (40.0, 120.0, "Redis"), (40.0, 300.0, "the way to Redis and back")],
)
def test_who_is_the_bottleneck(busy: float, fastest: float, who: str) -> None:
    case = Case("Redis: send", "raw")
    case.add("unibus", {"messages/s": 100.0, "CPU µs/message": 1.0, "busy %": busy})
    case.add("raw", {"messages/s": fastest, "CPU µs/message": 1.0, "busy %": 10.0})
    assert bottleneck(case.as_json()).startswith(f"{who}:")


def points(*costs: float) -> list[dict[str, float]]:
    return [{"n": 10.0 ** (i + 2), "CPU µs": cost, "MB": 1.0} for i, cost in enumerate(costs)]


def test_what_is_worse_than_n_log_n() -> None:
    assert not growth.worse(points(20, 20, 20, 20))
    assert not growth.worse(points(500, 60, 20, 20))  # what begins once is shared by few at first
    assert not growth.worse(points(20, 30, 40, 50))  # as log n does
    assert growth.worse(points(20, 25, 63, 200))  # as the root of n: n to the 1.5 in all
    assert growth.worse(points(500, 20, 20, 200))  # only at the end
    assert not growth.worse(points(20))


def test_memory_that_grows_with_what_waits_elsewhere() -> None:
    def memory(*found: float) -> list[dict[str, float]]:
        return [{"n": 10.0**i, "CPU µs": 1.0, "MB": own} for i, own in enumerate(found)]

    assert not growth.grows(memory(1, 4, 6, 8))
    assert growth.grows(memory(1, 2, 6, 40))
    assert not growth.grows(memory(5))


def test_limits_of_a_variable() -> None:
    limited = growth.Variable("groups", "handling", (1, 10, 100), limits={"sqs": (10, "slow")})
    assert limited.on("redis") == ((1, 10, 100), "")
    assert limited.on("sqs") == ((1, 10), "slow")


def test_workers_are_counted_while_all_are_at_work() -> None:
    early = [0.0, 1.0, 2.0, 3.0]
    late = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert together([early]) == STEP * 3 / 3.0
    assert together([early, late]) == STEP * (2 + 4) / 2.0
    with pytest.raises(Miscount):
        together([[0.0, 1.0], [1.0, 2.0]])


def test_how_many_messages_fit() -> None:
    assert fitting(12_345.6, 50_000) == 12_300
    assert fitting(1e9, 50_000) == 50_000
    assert fitting(3.0, 50_000) == LEAST


def test_nobody_is_always_the_first() -> None:
    assert [rotated("abc", n) for n in range(4)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_bodies_have_their_size() -> None:
    assert [len(body(size)) for size in (100, 256, 64_000)] == [100, 256, 64_000]


def test_consumer_performance_without_the_joining_of_its_group() -> None:
    watch = Watch()
    line = "2026-11-22 13:00:00:000, 2026-11-22 13:00:02:000, 4.88, 2.44, 20000, 10000.0, 1500, 500, 9.76, 40000.0"
    assert consumed(line, watch) == 20_000
    assert watch.figures(20_000) == {"messages/s": 40_000.0}


GROWN = {
    "broker": "memory",
    "variable": "groups",
    "unit": "handling",
    "points": [{"n": 1, "CPU µs": 20.0, "MB": 1.0}, {"n": 10, "CPU µs": 21.0, "MB": 1.5}],
    "limit": "",
}


def test_the_page_has_the_figures_of_its_runs() -> None:
    cases = [
        rates("Redis: send", "redis-py", unibus=[20, 21], FastStream=[2, 2], **{"redis-py": [10, 10]}),
        rates("Redis: consume", "redis-py", unibus=[30, 30], **{"redis-py": [10, 10]}),
        rates("Redis: consume, by hand", None, unibus=[15]),
    ]
    text = "before\n<!-- headline -->\nSTALE\n<!-- end -->\nbetween\n<!-- growth -->\n<!-- end -->\n<!-- flows -->\n<!-- end -->\nafter\n"
    filled = fill(text, Runs([run(*cases, growth=[GROWN])]))
    assert "STALE" not in filled
    assert "| FastStream | 2 (2 - 2) | 500,000 | 10.2 (10 - 10.5) |  |  |  |" in filled
    assert "**Kafka**: not measured." in filled
    assert "| memory | groups | 1 → 10 | 20 → 21 a handling | 0.304 | 1 → 1.5 |  |" in filled
    assert "| Redis: consume, by hand | 15 (15 - 15) | 66,670 |  |  |" in filled
    assert fill(filled, Runs([run(*cases, growth=[GROWN])])) == filled
    assert re.sub(r"(?s)-->\n.*?<!-- end", "--><!-- end", filled) == re.sub(
        r"(?s)-->\n.*?<!-- end", "--><!-- end", text
    )


def test_of_two_runs_each_case_is_that_of_one() -> None:
    first = run(
        rates("Redis: send", "raw", unibus=[20], raw=[10]), rates("Redis: consume", "raw", unibus=[5], raw=[10])
    )
    second = run(rates("Redis: send", "raw", unibus=[90], raw=[30]))
    runs = Runs([first, second])
    assert runs.label("Redis: send") == "Redis: send [2]"
    assert runs.label("Redis: consume") == "Redis: consume [1]"
    assert runs.cases["Redis: send"]["contestants"]["unibus"]["messages/s"]["to"]["raw"]["median"] == 3.0


def test_every_block_can_be_made_of_a_run_that_has_nothing() -> None:
    nothing = Runs([run()])
    assert all(block(nothing) for block in BLOCKS.values())


def test_the_committed_page_has_every_block_and_no_other() -> None:
    found = re.findall(r"^<!-- ([a-z-]+) -->$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(name for name in found if name != "end") == sorted(BLOCKS)
    assert found.count("end") == len(BLOCKS)
    assert page.PAGE.name == "performance.md"
