"""The contiguous prefix, against a model that is too slow to use and too simple to be wrong."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from unibus.tracker import Tracker


class Model(RuleBasedStateMachine):
    """Everything is kept, every answer is looked up from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = Tracker()
        self.seen: list[int] = []
        self.done: set[int] = set()

    @rule(gap=st.integers(1, 5))
    def add(self, gap: int) -> None:
        number = self.seen[-1] + gap if self.seen else gap - 2
        self.tracker.add(number)
        self.seen.append(number)

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.seen))
        assert self.tracker.finish(number) is (number not in self.done)
        self.done.add(number)

    @precondition(lambda self: self.seen)
    @rule()
    def finish_first(self) -> None:
        for number in self.seen:
            if number not in self.done:
                assert self.tracker.finish(number)
                self.done.add(number)
                break

    @rule(number=st.integers(-20, 200))
    def finish_unseen(self, number: int) -> None:
        if number not in self.seen:
            assert not self.tracker.finish(number)

    @precondition(lambda self: self.seen)
    @rule(back=st.integers(0, 10))
    def go_back(self, back: int) -> None:
        with pytest.raises(ValueError, match="ascending"):
            self.tracker.add(self.seen[-1] - back)

    @invariant()
    def agrees(self) -> None:
        prefix = None
        for number in self.seen:
            if number not in self.done:
                break
            prefix = number
        unfinished = [n for n in self.seen if n not in self.done]
        tracker = self.tracker
        assert tracker.prefix == prefix
        assert tracker.unfinished() == unfinished == list(tracker)
        assert tracker.unfinished(2) == unfinished[:2]
        assert tracker.first == (unfinished[0] if unfinished else None)
        assert tracker.last == (self.seen[-1] if self.seen else None)
        assert tracker.highest == max(self.done, default=None)
        assert len(tracker) == len(unfinished)
        assert all((n in tracker) is (n not in self.done) for n in self.seen)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40)


@given(st.permutations(range(20)))
def test_whatever_the_order_the_prefix_ends_at_the_last(order: list[int]) -> None:
    tracker = Tracker()
    for number in range(20):
        tracker.add(number)
    before = -1
    for number in order:
        tracker.finish(number)
        prefix = -1 if tracker.prefix is None else tracker.prefix
        assert prefix >= before
        before = prefix
    assert tracker.prefix == 19
    assert not tracker


def test_nothing_seen_nothing_finished() -> None:
    tracker = Tracker()
    assert tracker.prefix is tracker.first is tracker.last is tracker.highest is None
    assert tracker.unfinished() == []
    tracker.add(7)
    assert tracker.prefix is None
    assert repr(tracker) == "<Tracker up to None, 1 unfinished>"


@pytest.mark.parametrize("stuck", [False, True])
def test_a_long_run_takes_linear_time(stuck: bool) -> None:
    tracker = Tracker()
    tracker.add(0)
    if not stuck:
        tracker.finish(0)
    started = time.thread_time()
    for start in range(1, 200_000, 500):  # quadratic time would take minutes
        for number in range(start, start + 500):
            tracker.add(number)
        for number in range(start, start + 500):
            tracker.finish(number)
            assert (tracker.prefix is None) is stuck
    assert time.thread_time() - started < 10
    assert len(tracker) == stuck
