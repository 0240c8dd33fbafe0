"""The history and its checker: a clean run is kept, and each kind of broken one is found by the check that is meant to."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unibus.errors import ConnectionLost, NotFound
from unibus_contracts.history import Expected, History, Operation, Recorder, Verdict, check
from unibus_contracts.history.__main__ import main
from unibus_contracts.history.record import Kind, What

SECOND = 1_000_000_000


@dataclass
class Story:
    """Writes a history by hand: `story.send("a")`; each step is a second after the last."""

    told: list[Operation] = field(default_factory=list)
    now: int = 0
    calls: int = 0

    def step(self, what: What, kind: Kind | None = "ok", process: str = "p", lasts: float = 1, **about: object) -> int:
        """`kind=None`: it never ended."""
        self.calls += 1
        self.now += SECOND
        detail = about.pop("detail", "")
        self.told.append(Operation(process, self.calls, self.now, what, "invoke", **about))  # type: ignore[arg-type]  # by name
        if kind is not None:
            end = self.now + int(lasts * SECOND)
            self.told.append(Operation(process, self.calls, end, what, kind, detail=detail, **about))  # type: ignore[arg-type]
            self.now = end
        return self.calls

    def send(self, value: str, kind: Kind | None = "ok", **about: object) -> None:
        self.step("send", kind, value=value, place="q", **about)  # type: ignore[arg-type]

    def send_together(self, values: Iterable[str], process: str = "p", unknown: str = "", **about: object) -> None:
        """None of them is awaited before the next: one begins after the other, and all end at once."""
        told = {"place": "q", "key": "k"} | about
        begun = []
        for value in values:
            self.calls += 1
            self.now += SECOND
            begun.append((self.calls, value))
            self.told.append(Operation(process, self.calls, self.now, "send", "invoke", value, **told))  # type: ignore[arg-type]
        self.now += SECOND
        for call, value in begun:
            kind: Kind = "unknown" if value in unknown else "ok"
            self.told.append(Operation(process, call, self.now, "send", kind))

    def handle(self, value: str, kind: Kind | None = "ok", process: str = "c", **about: object) -> None:
        self.step("handle", kind, process, value=value, **({"place": "q"} | about))  # type: ignore[arg-type]

    def settle(self, value: str, kind: Kind | None = "ok", process: str = "c") -> None:
        """What the service sees of it."""
        self.step("settle", kind, process, value=value, place="q")

    def settled(self, values: str, word: str = "accepted", process: str = "c", failed: str = "") -> None:
        """What its adapter was told: `failed` of these could not be settled."""
        self.calls += 1
        self.now += SECOND
        self.told.append(Operation(process, self.calls, self.now, "settled", "invoke", values, "q", detail=word))
        self.now += SECOND
        kind: Kind = "unknown" if failed else "ok"
        self.told.append(Operation(process, self.calls, self.now, "settled", kind, failed))

    def note(self, what: What, values: str = "", process: str = "c", kind: Kind = "ok", **about: str) -> None:
        self.calls += 1
        self.now += SECOND
        place, group = about.get("place", "q"), about.get("group", "")
        self.told.append(Operation(process, self.calls, self.now, what, kind, values, place, group))

    def look(self, value: str, where: str, group: str = "") -> None:
        self.calls += 1
        self.told.append(Operation("n", self.calls, self.now, "look", "ok", value, "q", group, detail=where))

    def fault(self, kind: Kind | None = "ok", name: str = "cut", **about: object) -> None:
        self.step("fault", kind, "f", value=name, **about)  # type: ignore[arg-type]

    def end(self, expected: Expected | None = None, killed: str = "") -> Verdict:
        """The verdict. `killed`: these said no last word."""
        self.step("drain")
        for process in sorted({operation.process for operation in self.told} - set(killed.split())):
            self.note("bye", process=process, place="")
        return check(self.told, expected)


CALM = Expected()
ORDERED = Expected(ordered=frozenset({"q"}))


def found(verdict: Verdict) -> list[tuple[str, str]]:
    return [(finding.check, finding.value) for finding in verdict.findings]


def test_a_clean_run_is_kept() -> None:
    story = Story()
    for value in "abc":
        story.send(value)
    for value in "abc":
        story.handle(value, attempt=1)
        story.settle(value)
    verdict = story.end()
    assert verdict.status == "kept"
    assert verdict.findings == ()
    assert (verdict.counts["sent"], verdict.counts["confirmed"], verdict.counts["handled"]) == (3, 3, 3)


def never_delivered(story: Story) -> Expected:
    story.send("a")
    return CALM


def handled_in_vain(story: Story) -> Expected:
    story.send("a")
    story.handle("a", "fail", attempt=1)
    return CALM


def not_in_each_group(story: Story) -> Expected:
    story.send("a")
    story.handle("a", group="g")
    return Expected({"q": ("g", "h")})


def dead_in_another_group(story: Story) -> Expected:
    story.send("a")
    story.handle("a", "fail", group="g")
    story.look("a", "dead", "g")
    return Expected({"q": ("g", "h")})


def killed_while_handled(story: Story) -> Expected:
    story.send("a")
    story.handle("a", None)
    return CALM


def dead_without_a_run(story: Story) -> Expected:
    story.send("a")
    story.look("a", "dead")
    return CALM


def dead_after_it_was_handled(story: Story) -> Expected:
    story.send("a")
    story.handle("a", attempt=1)
    story.look("a", "dead")
    return CALM


def dead_for_another_groups_failure(story: Story) -> Expected:
    story.send("a")
    story.handle("a", "fail", group="g")
    story.handle("a", group="g")
    story.handle("a", group="h")
    story.look("a", "dead", "h")
    return Expected({"q": ("g", "h")})


def dead_too_early(story: Story) -> Expected:
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.look("a", "dead")
    return Expected(runs=2)


def still_there(story: Story) -> Expected:
    story.send("a")
    story.look("a", "stored")
    return CALM


def sent_by_nobody(story: Story) -> Expected:
    story.handle("a")
    story.send("b")
    story.handle("b")
    return CALM


def from_another_channel(story: Story) -> Expected:
    story.send("a")
    story.handle("a")
    story.handle("a", place="other")
    return CALM


def refused_and_yet_there(story: Story) -> Expected:
    story.send("a", "fail", detail="NotFound")
    story.handle("a")
    story.send("b")
    story.handle("b")
    return CALM


def handled_twice(story: Story) -> Expected:
    story.send("a")
    story.handle("a", process="c")
    story.handle("a", process="d")
    return CALM


def a_later_one_first(story: Story) -> Expected:
    story.send("a", key="k")
    story.send("b", key="k")
    story.handle("b", key="k")
    story.handle("a", key="k")
    return ORDERED


def sent_together_and_handled_backwards(story: Story) -> Expected:
    """Ten of one key, by one process, in one batch."""
    story.send_together("0123456789")
    for value in "9876543210":
        story.handle(value, key="k")
    return ORDERED


def backwards_around_one_of_which_nothing_is_known(story: Story) -> Expected:
    story.send_together("abc", unknown="b")
    for value in "cba":
        story.handle(value, key="k")
    return ORDERED


def backwards_after_it_was_sent_again(story: Story) -> Expected:
    """While one is sent again in a fault, the later ones of its key wait for it."""
    story.fault()
    story.note("try", "a", process="p", kind="unknown")
    story.send_together("ab")
    story.handle("b", key="k")
    story.handle("a", key="k")
    return ORDERED


def backwards_in_one_group(story: Story) -> Expected:
    story.send_together("ab")
    for value, group in (("a", "g"), ("b", "h"), ("b", "g"), ("a", "h")):
        story.handle(value, key="k", group=group)
    return Expected({"q": ("g", "h")}, frozenset({"q"}))


def both_at_once(story: Story) -> Expected:
    story.send("a", key="k")
    story.send("b", key="k")
    story.handle("a", key="k", lasts=5)
    story.now -= 4 * SECOND
    story.handle("b", key="k", process="d")
    return ORDERED


def attempts_go_back(story: Story) -> Expected:
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.handle("a", "fail", attempt=2)
    story.handle("a", attempt=1)
    return CALM


def attempts_without_failures(story: Story) -> Expected:
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.handle("a", attempt=3)
    return CALM


def anothers_reply(story: Story) -> Expected:
    story.step("request", "ok", "r1", value="a", place="q", detail="b")
    story.handle("a")
    return CALM


def back_after_its_end(story: Story) -> Expected:
    story.send("a")
    story.handle("a", "unknown")
    story.settle("a")
    story.handle("a", "unknown")
    story.look("a", "dead")
    return CALM


def back_after_a_restart(story: Story) -> Expected:
    """The settlement was confirmed; that the link broke afterwards excuses nothing."""
    story.send("a")
    story.handle("a")
    story.settled("a")
    story.fault()
    story.note("lost")
    story.handle("a")
    return CALM


def twice_in_a_fault(story: Story) -> Expected:
    """That something was broken at the time explains nothing, as long as the delivery was not lost."""
    story.send("a")
    story.handle("a")
    story.fault()
    story.handle("a", process="d")
    story.settled("a", process="d")
    return CALM


def lost_by_another_process(story: Story) -> Expected:
    story.send("a")
    story.handle("a")
    story.note("lost", process="d")
    story.handle("a", process="d")
    return CALM


def another_message_was_taken(story: Story) -> Expected:
    story.send("a")
    story.handle("a")
    story.note("lost", "b")
    story.handle("a", process="d")
    return CALM


def lost_before_it_was_handled(story: Story) -> Expected:
    story.send("a")
    story.note("lost")
    story.handle("a")
    story.handle("a")
    return CALM


def lost_long_after_it_came_again(story: Story) -> Expected:
    story.send("a")
    story.handle("a")
    story.handle("a", process="d")
    story.now += 20 * SECOND
    story.note("lost")
    return CALM


def one_try_is_one_copy(story: Story) -> Expected:
    """It was tried once, and given up: there can't be two of it."""
    story.note("try", "a", process="p", kind="unknown")
    story.send("a", "unknown")
    story.handle("a")
    story.handle("a")
    story.send("b")
    story.handle("b")
    return CALM


def settled_and_copied_in_order(story: Story) -> Expected:
    """The copy was confirmed, and the original settled: there is one of it again."""
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.note("copied", "a")
    story.settled("a", "moved")
    story.handle("a", attempt=2)
    story.settled("a")
    story.handle("a", attempt=2)
    return CALM


def a_link_broke_before_it_was_tried(story: Story) -> Expected:
    """Nothing was lost since the handler began that failed: there is one copy, and it was settled."""
    story.send("a")
    story.note("lost")
    story.handle("a", "fail", attempt=1)
    story.note("copied", "a")
    story.settled("a", "moved")
    story.handle("a", attempt=2)
    story.settled("a")
    story.handle("a", attempt=2)
    return CALM


def another_of_the_batch_was_not_settled(story: Story) -> Expected:
    story.send("a")
    story.send("b")
    story.handle("a")
    story.handle("b")
    story.settled("a b", failed="b")
    story.handle("a")
    story.handle("b")
    return CALM


def a_failure_before_that_was_settled_in_order(story: Story) -> Expected:
    """Nobody was killed, so the copy for the retry is the only one."""
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.settled("a", "moved")
    story.handle("a", attempt=2)
    story.settled("a")
    story.handle("a", attempt=2)
    return CALM


def an_old_settlement_without_confirmation(story: Story) -> Expected:
    """The broker does not confirm it; but the link broke so long afterwards that it must have been seen."""
    story.send("a")
    story.handle("a")
    story.settled("a")
    story.now += 10 * SECOND
    story.note("lost")
    story.handle("a")
    return Expected(settle_confirmed=False)


def a_settlement_that_nothing_followed(story: Story) -> Expected:
    story.send("a")
    story.handle("a")
    story.settled("a")
    story.handle("a")
    return Expected(settle_confirmed=False)


def stalled(story: Story, process: str = "d", seconds: float = 0.0) -> None:
    """It stood still until now: for so long, or since the beginning."""
    story.calls += 1
    detail = f"{seconds or story.now / SECOND:.2f}"
    story.told.append(Operation(process, story.calls, story.now, "stalled", "ok", detail=detail))


def settled_by_another(story: Story) -> None:
    story.send("a")
    story.handle("a")
    story.settled("a")


def stood_still_and_lost_nothing(story: Story) -> Expected:
    settled_by_another(story)
    stalled(story)
    story.handle("a", process="d")
    return CALM


def stood_still_long_before_it_lost_its_link(story: Story) -> Expected:
    settled_by_another(story)
    stalled(story)
    story.handle("a", process="d")
    story.now += 10 * SECOND
    story.note("lost", process="d")
    return CALM


def settled_before_the_fault_that_broke_a_link(story: Story) -> Expected:
    settled_by_another(story)
    story.fault()
    story.handle("a", process="d")
    story.note("lost", process="d")
    return CALM


def lost_its_link_long_after_a_fault(story: Story) -> Expected:
    story.fault()
    settled_by_another(story)
    story.now += 10 * SECOND
    story.handle("a", process="d")
    story.note("lost", process="d")
    return CALM


def lost_its_link_and_did_not_stand_still(story: Story) -> Expected:
    settled_by_another(story)
    story.now += SECOND
    stalled(story, seconds=0.5)
    stalled(story, process="c")
    story.handle("a", process="d")
    story.note("lost", process="d")
    return CALM


def stood_still_lost_its_link_and_got_it_by_a_new_one(story: Story) -> Expected:
    settled_by_another(story)
    stalled(story)
    story.note("lost", process="d")
    story.handle("a", process="d")
    return CALM


def back_in_a_fault_that_lost_nothing(story: Story) -> Expected:
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.handle("a", "fail", attempt=2)
    story.fault()
    story.handle("a", attempt=1)
    return CALM


def both_in_a_fault_that_lost_nothing(story: Story) -> Expected:
    story.send("a", key="k")
    story.send("b", key="k")
    story.fault(lasts=10)
    story.now -= 8 * SECOND
    story.handle("a", key="k", lasts=5)
    story.now -= 4 * SECOND
    story.handle("b", key="k", process="d")
    return ORDERED


def without_effect(story: Story) -> Expected:
    story.send("a")
    story.handle("a")
    story.fault("fail", detail="no connection was cut")
    return CALM


@pytest.mark.parametrize(
    ("tell", "findings"),
    [
        (never_delivered, [("lost", "a")]),
        (handled_in_vain, [("lost", "a")]),
        (not_in_each_group, [("lost", "a")]),
        (dead_in_another_group, [("lost", "a")]),
        (killed_while_handled, [("lost", "a")]),
        (dead_without_a_run, [("innocent", "a")]),
        (dead_after_it_was_handled, [("innocent", "a")]),
        (dead_for_another_groups_failure, [("innocent", "a")]),
        (dead_too_early, [("innocent", "a")]),
        (still_there, [("left", "a")]),
        (sent_by_nobody, [("unexpected", "a")]),
        (from_another_channel, [("unexpected", "a")]),
        (refused_and_yet_there, [("resurrected", "a")]),
        (handled_twice, [("duplicate", "a")]),
        (a_later_one_first, [("order", "a")]),
        (sent_together_and_handled_backwards, [("order", value) for value in "876543210"]),
        (backwards_around_one_of_which_nothing_is_known, [("order", "a")]),
        (backwards_after_it_was_sent_again, [("order", "a")]),
        (backwards_in_one_group, [("order", "a")]),
        (both_at_once, [("overlap", "b")]),
        (attempts_go_back, [("attempt_back", "a")]),
        (attempts_without_failures, [("attempt_high", "a")]),
        (anothers_reply, [("reply", "a")]),
        (back_after_its_end, [("came_back", "a")]),
        (back_after_a_restart, [("came_back", "a")]),
        (twice_in_a_fault, [("duplicate", "a")]),
        (lost_by_another_process, [("duplicate", "a")]),
        (another_message_was_taken, [("duplicate", "a")]),
        (lost_before_it_was_handled, [("duplicate", "a")]),
        (lost_long_after_it_came_again, [("duplicate", "a")]),
        (one_try_is_one_copy, [("duplicate", "a")]),
        (settled_and_copied_in_order, [("came_back", "a")]),
        (a_link_broke_before_it_was_tried, [("came_back", "a")]),
        (a_failure_before_that_was_settled_in_order, [("came_back", "a")]),
        (another_of_the_batch_was_not_settled, [("came_back", "a")]),
        (an_old_settlement_without_confirmation, [("came_back", "a")]),
        (a_settlement_that_nothing_followed, [("came_back", "a")]),
        (stood_still_and_lost_nothing, [("came_back", "a")]),
        (stood_still_long_before_it_lost_its_link, [("came_back", "a")]),
        (settled_before_the_fault_that_broke_a_link, [("came_back", "a")]),
        (lost_its_link_long_after_a_fault, [("came_back", "a")]),
        (lost_its_link_and_did_not_stand_still, [("came_back", "a")]),
        (stood_still_lost_its_link_and_got_it_by_a_new_one, [("came_back", "a")]),
        (back_in_a_fault_that_lost_nothing, [("attempt_back", "a")]),
        (both_in_a_fault_that_lost_nothing, [("overlap", "b")]),
        (without_effect, [("no_bite", "cut")]),
    ],
)
def test_a_broken_run_is_found(tell: Callable[[Story], Expected], findings: list[tuple[str, str]]) -> None:
    story = Story()
    expected = tell(story)
    verdict = story.end(expected)
    assert verdict.status == "broken"
    assert found(verdict) == findings


def a_retry(story: Story) -> None:
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.handle("a", attempt=2)


def dead_lettered(story: Story) -> None:
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.look("a", "dead")


def dead_after_its_process_was_killed(story: Story) -> None:
    story.send("a")
    story.handle("a", None, "killed")
    story.look("a", "dead")


def never_told_and_gone(story: Story) -> None:
    story.send("a", "unknown")
    story.send("b")
    story.handle("b")


def never_told_and_there(story: Story) -> None:
    story.send("a", None)
    story.handle("a")
    story.send("b")
    story.handle("b")


def again_after_its_link_broke(story: Story) -> None:
    story.send("a", key="k")
    story.handle("a", key="k")
    story.note("lost")
    story.handle("a", key="k", process="d")


def again_before_its_process_knew(story: Story) -> None:
    """The broker saw the link break first."""
    story.send("a")
    story.handle("a")
    story.handle("a", process="d")
    story.note("lost")


def again_after_it_was_taken_away(story: Story) -> None:
    story.send("a")
    story.handle("a")
    story.note("lost", "b a")
    story.handle("a", process="d")


def again_after_its_settlement_failed(story: Story) -> None:
    story.send("a")
    story.send("b")
    story.handle("a")
    story.handle("b")
    story.settled("a b", failed="a")
    story.handle("a", process="d")


def again_after_its_process_was_killed(story: Story) -> None:
    story.send("a")
    story.handle("a", process="killed")
    story.handle("a")


def copies_of_an_unsure_send(story: Story) -> None:
    story.note("try", "a", process="p", kind="unknown")
    story.send("a")
    story.handle("a")
    story.settled("a")
    story.handle("a")
    story.settled("a")


def copies_of_a_request_without_a_reply(story: Story) -> None:
    """Sent again, and confirmed then; its reply was lost with the link."""
    story.send("a")
    story.handle("a")
    story.settled("a")
    story.note("try", "r", process="p", kind="unknown")
    story.step("request", "unknown", "p", value="r", place="q")
    story.handle("r")
    story.settled("r")
    story.handle("r")
    story.settled("r")


def copies_of_an_unsure_retry(story: Story) -> None:
    """The copy is there, and the original came back, since the link broke before it was settled."""
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.note("copied", "a")
    story.note("lost")
    story.handle("a", attempt=2)
    story.settled("a")
    story.handle("a", "fail", attempt=1)
    story.handle("a", attempt=2)


def copies_of_a_retry_that_was_on_its_way(story: Story) -> None:
    """The link broke before the copy was confirmed; the original came back, was copied once more, and settled for that copy."""
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.note("lost", "a")
    story.note("copied", "a")
    story.handle("a", "fail", attempt=1)
    story.note("copied", "a")
    story.handle("a", attempt=2)
    story.settled("a", "moved")
    story.handle("a", attempt=2)


def copies_by_one_that_was_killed(story: Story) -> None:
    """It had sent the copy, and never heard that it was there."""
    story.send("a")
    story.handle("a", "fail", "killed", attempt=1)
    story.handle("a", attempt=2)
    story.settled("a")
    story.handle("a", "fail", attempt=1)
    story.note("copied", "a")
    story.settled("a", "moved")
    story.handle("a", attempt=2)
    story.settled("a")


def again_by_one_that_stood_still(story: Story) -> None:
    """It had it in hand when its loop stopped, and noticed that its link was gone when it had begun to handle it."""
    settled_by_another(story)
    stalled(story)
    story.handle("a", process="d")
    story.note("lost", process="d")


def again_by_one_that_stood_still_and_could_not_settle(story: Story) -> None:
    settled_by_another(story)
    stalled(story)
    story.handle("a", process="d")
    story.settled("a", process="d", failed="a")


def again_by_one_that_stood_still_and_was_killed(story: Story) -> None:
    settled_by_another(story)
    stalled(story, process="killed")
    story.handle("a", process="killed")


def again_by_one_whose_link_a_fault_had_broken(story: Story) -> None:
    story.send("a")
    story.handle("a")
    story.fault()
    story.settled("a")
    story.handle("a", process="d")
    story.note("lost", process="d")


def together_with_one_whose_link_a_fault_had_broken(story: Story) -> None:
    """The other has not settled it when this one begins."""
    story.send("a")
    story.fault()
    story.handle("a")
    story.handle("a", process="d")
    story.note("lost", process="d")
    story.settled("a")


def overtaken_by_who_got_the_key(story: Story) -> None:
    story.send("a", key="k")
    story.send("b", key="k")
    story.handle("a", key="k", lasts=5)
    story.now -= 4 * SECOND
    story.handle("b", key="k", process="d")
    story.note("lost", "a")


def sent_together_and_handled_in_order(story: Story) -> None:
    story.send_together("0123456789")
    for value in "0123456789":
        story.handle(value, key="k")


def one_of_which_nothing_is_known_comes_at_any_time(story: Story) -> None:
    """Those around it keep their order."""
    story.send_together("abcd", unknown="bc")
    for value in "cadb":
        story.handle(value, key="k")


def the_first_comes_again_after_the_second(story: Story) -> None:
    story.send_together("ab")
    for value in "aba":
        story.handle(value, key="k")
        if value == "b":
            story.note("lost", "a")


def senders_know_nothing_of_each_other(story: Story) -> None:
    story.step("send", "ok", "p1", value="a", place="q", key="k")
    story.step("send", "ok", "p2", value="b", place="q", key="k")
    story.handle("b", key="k")
    story.handle("a", key="k")


def senders_at_the_same_time(story: Story) -> None:
    story.send_together("abc", process="p1")
    story.now -= 4 * SECOND
    story.send_together("xyz", process="p2")
    for value in "xaybcz":
        story.handle(value, key="k")


def backwards_where_there_is_no_order(story: Story) -> None:
    story.send_together("abc", place="unordered")
    for value in "cba":
        story.handle(value, key="k", place="unordered")


def backwards_without_a_key(story: Story) -> None:
    story.send_together("abc", key="")
    for value in "cba":
        story.handle(value)


def keys_know_nothing_of_each_other(story: Story) -> None:
    story.send_together("ab", key="k")
    story.send_together("cd", key="l")
    for value, key in (("c", "l"), ("a", "k"), ("d", "l"), ("b", "k")):
        story.handle(value, key=key)


def attempts_forgotten_with_the_delivery(story: Story) -> None:
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.handle("a", "fail", attempt=2)
    story.note("lost")
    story.handle("a", attempt=2)


def attempts_forgotten_by_who_gave_it_back(story: Story) -> None:
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.handle("a", "fail", attempt=2)
    story.settled("a", "released")
    story.handle("a", attempt=1)


@pytest.mark.parametrize(
    "tell",
    [
        a_retry,
        dead_lettered,
        dead_after_its_process_was_killed,
        never_told_and_gone,
        never_told_and_there,
        again_after_its_link_broke,
        again_before_its_process_knew,
        again_after_it_was_taken_away,
        again_after_its_settlement_failed,
        again_after_its_process_was_killed,
        copies_of_an_unsure_send,
        copies_of_a_request_without_a_reply,
        copies_of_an_unsure_retry,
        copies_of_a_retry_that_was_on_its_way,
        copies_by_one_that_was_killed,
        again_by_one_that_stood_still,
        again_by_one_that_stood_still_and_could_not_settle,
        again_by_one_that_stood_still_and_was_killed,
        again_by_one_whose_link_a_fault_had_broken,
        together_with_one_whose_link_a_fault_had_broken,
        overtaken_by_who_got_the_key,
        sent_together_and_handled_in_order,
        one_of_which_nothing_is_known_comes_at_any_time,
        the_first_comes_again_after_the_second,
        senders_know_nothing_of_each_other,
        senders_at_the_same_time,
        backwards_where_there_is_no_order,
        backwards_without_a_key,
        keys_know_nothing_of_each_other,
        attempts_forgotten_with_the_delivery,
        attempts_forgotten_by_who_gave_it_back,
    ],
)
def test_what_is_allowed_is_no_finding(tell: Callable[[Story], None]) -> None:
    story = Story()
    tell(story)
    verdict = story.end(ORDERED, killed="killed")
    assert verdict.findings == ()
    assert verdict.status == "kept"


def test_what_is_counted() -> None:
    story = Story()
    again_after_its_link_broke(story)
    story.fault()
    story.send("b", "unknown")
    story.handle("b")
    story.send("c", "fail")
    story.send("d", "unknown")
    story.send("e")
    story.handle("e", "fail")
    story.look("e", "dead")
    story.step("request", "ok", "r1", value="f", place="q", detail="f")
    story.handle("f")
    story.step("request", "unknown", "r1", value="g", place="q")
    assert story.end(CALM).counts == {
        "sent": 7,
        "confirmed": 3,
        "failed": 1,
        "unknown": 3,
        "recovered": 1,
        "requests": 2,
        "answered": 1,
        "handled": 3,
        "lost": 0,
        "duplicates": 1,
        "by_link": 1,
        "unexplained_duplicates": 0,
        "dead_letters": 1,
        "faults": 1,
        "findings": 0,
    }


def test_where_no_settlement_is_confirmed_the_last_ones_before_a_break_may_be_lost() -> None:
    story = Story()
    story.send("a")
    story.handle("a")
    story.settled("a")
    story.note("lost")
    story.handle("a")
    assert story.end(Expected(settle_confirmed=False)).counts["by_ack"] == 1
    assert found(check(story.told, Expected(settle_confirmed=False, settle_window=0.5))) == [("came_back", "a")]
    assert found(check(story.told, CALM)) == [("came_back", "a")]


def test_with_a_settlement_that_was_lost_its_attempts_are_forgotten() -> None:
    """A primary that was none any more had taken the retries and the end, and is gone with them."""
    story = Story()
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.handle("a", attempt=2)
    story.settled("a")
    story.note("lost")
    story.handle("a", attempt=1)
    assert found(story.end(Expected(settle_confirmed=False))) == []
    assert found(check(story.told, Expected(settle_confirmed=False, settle_window=0.5))) == [
        ("came_back", "a"),
        ("attempt_back", "a"),
    ]


def test_what_its_adapter_could_not_commit_comes_again() -> None:
    def told(value: str, process: str = "c") -> Story:
        story = Story()
        story.send("a")
        story.handle("a")
        story.settled("a")
        story.now += 10 * SECOND
        story.note("uncommitted", value, process)
        story.handle("a", process="d")
        return story

    assert told("a").end(Expected(settle_confirmed=False)).counts["by_unsettled"] == 1
    assert found(told("a").end(Expected(settle_confirmed=True))) == [("came_back", "a")]
    assert found(told("b").end(Expected(settle_confirmed=False))) == [("came_back", "a")]
    assert found(told("a", "e").end(Expected(settle_confirmed=False))) == [("came_back", "a")]


def test_an_original_may_come_back_beside_its_copy_where_its_settlement_was_not_confirmed() -> None:
    story = Story()
    story.send("a")
    story.handle("a", "fail", attempt=1)
    story.note("copied", "a")
    story.settled("a", "moved")
    story.note("lost")
    story.handle("a", attempt=2)
    story.handle("a", "fail", attempt=1)
    story.handle("a", attempt=2)
    assert found(story.end(Expected(settle_confirmed=False))) == []
    assert found(check(story.told, CALM)) == [("duplicate", "a"), ("attempt_back", "a")]


def test_a_settlement_may_be_on_its_way_for_as_long_as_a_fault_holds_it_back() -> None:
    story = Story()
    story.send("a")
    story.handle("a")
    story.fault(lasts=20)
    story.now -= 20 * SECOND
    story.settled("a")
    story.now += 17 * SECOND
    story.note("lost")
    story.handle("a")
    assert story.end(Expected(settle_confirmed=False)).counts["by_ack"] == 1


@pytest.mark.parametrize(
    ("tell", "why"),
    [
        (lambda story: None, "never delivered and not on the broker: lost by the sender or the broker"),
        (
            lambda story: story.look("a", "logged"),
            "the broker has had it, and nobody got it: the consumer's doing",
        ),
        (
            lambda story: story.settled("a"),
            "accepted by c, never handled with success, and gone: the consumer's doing",
        ),
        (
            lambda story: story.handle("a", None),
            "delivered, never settled, and gone: lost by the broker, or settled by one that was killed",
        ),
        (lambda story: story.look("a", "stored"), "still on the broker after the drain, the consumer's doing"),
    ],
)
def test_a_loss_is_put_down_to_somebody(tell: Callable[[Story], None], why: str) -> None:
    story = Story()
    story.send("a")
    tell(story)
    (finding,) = story.end(CALM).findings
    assert finding.why == f"q: {why}"


def test_a_run_of_which_nothing_is_known_is_no_pass() -> None:
    story = Story()
    story.send("a", "unknown")
    story.handle("a")
    verdict = story.end(Expected(least=1))
    assert verdict.status == "inconclusive"
    assert verdict.why == "0 of 1 sends are known to have happened; 1 are needed"


@pytest.mark.parametrize("kind", ["fail", "unknown", None])
def test_a_drain_that_did_not_end_makes_the_run_invalid(kind: Kind | None) -> None:
    story = Story()
    a_retry(story)
    story.step("drain", kind)
    verdict = check(story.told)
    assert (verdict.status, verdict.why) == (
        "invalid",
        "the drain did not come to its end: what is missing may only be late",
    )


def test_without_a_drain_nothing_is_proven() -> None:
    story = Story()
    a_retry(story)
    assert check(story.told).status == "invalid"


def test_files_that_do_not_fit_together_are_invalid() -> None:
    story = Story()
    a_retry(story)
    assert check([*story.told, story.told[0]]).why == "process p has invoked call 1 twice"
    assert check(story.told[1:]).why == "process p has ended call 1 without having invoked it"


@given(st.permutations([("a", 1), ("b", 2), ("c", 3), ("d", 4)]), st.data())
def test_any_one_message_taken_out_of_a_clean_run_is_found(order: list[tuple[str, int]], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from("abcd"))
    story = Story()
    for value, seq in order:
        story.send(value, key="k", seq=seq)
    for value, _ in order:
        if value != gone:
            story.handle(value, key="k")
    assert found(story.end(ORDERED)) == [("lost", gone)]


# The recorder


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    with Recorder(tmp_path, "p") as recorder:
        with recorder.during("send", value="a", place="q", key="k", seq=1):
            pass
        with pytest.raises(NotFound), recorder.during("send", value="b", place="q"):
            raise NotFound("queue 'q' is not there")
        with pytest.raises(ConnectionLost), recorder.during("send", value="c", place="q"):
            raise ConnectionLost("gone")
        with pytest.raises(RuntimeError), recorder.during("send", value="d", place="q"):
            raise RuntimeError("nobody has classified this")
        with pytest.raises(RuntimeError), recorder.during("handle", value="a", place="q", attempt=1):
            raise RuntimeError("a handler")
        with pytest.raises(asyncio.CancelledError), recorder.during("handle", value="a", place="q", attempt=2):
            raise asyncio.CancelledError
        with recorder.during("fault", value="cut") as ending:
            ending.kind, ending.detail = "fail", "nothing was cut"
        recorder.note("look", value="a", detail="dead")
    told = list(History(tmp_path))
    values = {o.call: o.value for o in told if o.value}
    ends = [(o.what, values[o.call], o.kind, o.detail) for o in told if o.kind != "invoke"]
    assert ends == [
        ("send", "a", "ok", ""),
        ("send", "b", "fail", "NotFound"),
        ("send", "c", "unknown", "ConnectionLost"),
        ("send", "d", "unknown", "RuntimeError"),
        ("handle", "a", "fail", "RuntimeError"),
        ("handle", "a", "unknown", "CancelledError"),
        ("fault", "cut", "fail", "nothing was cut"),
        ("look", "a", "ok", "dead"),
    ]
    assert sum(o.kind == "invoke" for o in told) == 7
    assert (told[0].key, told[0].seq, told[0].process) == ("k", 1, "p")
    assert [o.at for o in told] == sorted(o.at for o in told)


def test_a_process_has_one_file(tmp_path: Path) -> None:
    with Recorder(tmp_path, "p"), pytest.raises(FileExistsError):
        Recorder(tmp_path, "p")


def _die(folder: Path) -> None:
    with Recorder(folder, "child").during("handle", value="a", place="q"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_had_begun_is_there_without_an_end(tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_die, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [(o.what, o.kind, o.value) for o in list(History(tmp_path))] == [("handle", "invoke", "a")]


def test_lines_of_one_turn_are_written_at_its_end_or_when_told(tmp_path: Path) -> None:
    def lines() -> int:
        return (tmp_path / "p.jsonl").read_bytes().count(b"\n")

    async def say(recorder: Recorder) -> None:
        with recorder.during("send", value="a", place="q"):
            assert lines() == 0
            recorder.flush()
            assert lines() == 1
        assert lines() == 1
        await asyncio.sleep(0)
        assert lines() == 2
        recorder.note("bye")

    with Recorder(tmp_path, "p") as recorder:
        recorder.by_tick = True
        asyncio.run(say(recorder))
        recorder.note("look", value="a", detail="dead")  # there is no event loop any more
    assert [(o.what, o.kind) for o in History(tmp_path)] == [
        ("send", "invoke"),
        ("send", "ok"),
        ("bye", "ok"),
        ("look", "ok"),
    ]


def _die_within_a_turn(folder: Path) -> None:
    async def work() -> None:
        with recorder.during("handle", value="a", place="q"):
            recorder.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    with Recorder(folder, "child") as recorder:
        recorder.by_tick = True
        asyncio.run(work())


def test_a_kill_takes_what_was_not_flushed_and_no_more(tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_die_within_a_turn, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [(o.what, o.kind, o.value) for o in History(tmp_path)] == [("handle", "invoke", "a")]


def test_some_operations_are_read_without_the_others(tmp_path: Path) -> None:
    with Recorder(tmp_path, "p") as recorder:
        with recorder.during("send", value="a", place="q"):
            pass
        recorder.note("look", value="a", detail="dead")
        with recorder.during("settle", value="a", place="q"):
            pass
    history = History(tmp_path)
    assert list(history.of("send", "settle")) == [o for o in history if o.what != "look"]


def test_half_a_line_at_the_end_is_what_a_kill_leaves(tmp_path: Path) -> None:
    with Recorder(tmp_path, "p") as recorder:
        recorder.note("look", value="a", detail="dead")
    with (tmp_path / "p.jsonl").open("ab") as file:
        file.write(b'{"process":"p","ca')
    assert [o.value for o in list(History(tmp_path))] == ["a"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"process":"p","ca',
        b"[]",
        b'{"call":1,"at":2,"what":"bye"}',
        b'{"call":1,"at":2,"what":"bye","kind":"ok","wrong":1}',
    ],
)
def test_half_a_line_in_the_middle_is_an_error(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "p.jsonl").write_bytes(line + b"\n{}\n")
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1 is no operation"):
        list(History(tmp_path))


# The command


def write(folder: Path, story: Story) -> None:
    recorders = {process: Recorder(folder, process) for process in {o.process for o in story.told}}
    for operation in story.told:
        recorders[operation.process].write(operation)
    for recorder in recorders.values():
        recorder.close()


def test_the_command_says_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = Story()
    a_later_one_first(story)
    story.send("t")
    story.end()
    write(tmp_path, story)
    assert main([str(tmp_path), "--ordered", "q"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "broken"
    assert "  sent: 3" in said
    assert said[-2:] == [
        "lost: t: q: never delivered and not on the broker: lost by the sender or the broker",
        "order: a: q, key 'k': a later message was handled first",
    ]


def test_the_command_is_told_what_the_policy_wants(tmp_path: Path) -> None:
    story = Story()
    dead_too_early(story)
    story.end()
    write(tmp_path, story)
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "--runs", "2"]) == 1


def test_the_command_tells_proof_from_its_absence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = Story()
    a_retry(story)
    write(tmp_path, story)
    assert main([str(tmp_path)]) == 3
    assert capsys.readouterr().out.startswith("invalid: nothing was drained")


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "absent")])
    assert "is no folder" in capsys.readouterr().err
