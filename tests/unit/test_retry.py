"""What becomes of a failed message: the policy as tables."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unibus.errors import ConfigError
from unibus.retry import (
    ACK,
    CRASH_LOOP,
    NON_RETRYABLE,
    RELEASE,
    RETRIES_EXHAUSTED,
    SUSPECT_AFTER,
    Action,
    BatchFailed,
    DeadLetter,
    Discard,
    Retry,
    RetryPolicy,
    Suspicion,
    Verdict,
    decide,
    suspect,
)

ERROR = ValueError("x")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_retries", 5),
        ("backoff", 1.0),
        ("multiplier", 4.0),
        ("max_backoff", 300.0),
        ("jitter", 0.0),
        ("immediate", 0),
        ("crash_limit", 3),
        ("retry_on", (BaseException,)),
        ("give_up_on", ()),
    ],
)
def test_built_in_values(name: str, value: object) -> None:
    assert getattr(RetryPolicy(), name) == value


def test_every_built_in_value_is_tested() -> None:
    assert len(RetryPolicy.__dataclass_fields__) == 9


def test_built_in_waits() -> None:
    assert RetryPolicy().waits() == (1.0, 4.0, 16.0, 64.0, 256.0)
    assert SUSPECT_AFTER == 3


@pytest.mark.parametrize(
    ("policy", "waits"),
    [
        ({"max_retries": 3, "backoff": 1, "multiplier": 5}, [1, 5, 25]),
        ({"max_retries": 3, "backoff": 2, "multiplier": 1}, [2, 2, 2]),
        ({"max_retries": 4, "backoff": 100, "multiplier": 2}, [100, 200, 300, 300]),
        ({"max_retries": 3, "backoff": 0}, [0, 0, 0]),
        ({"max_retries": 4, "immediate": 2, "backoff": 1, "multiplier": 3}, [0, 0, 1, 3]),
        ({"max_retries": 2, "immediate": 5}, [0, 0]),
        ({"max_retries": 0}, []),
        ({"max_retries": 2, "backoff": 0, "max_backoff": 0}, [0, 0]),
    ],
)
def test_waits(policy: dict[str, Any], waits: list[float]) -> None:
    made = RetryPolicy(**policy)
    assert [made.wait(n) for n in range(1, made.max_retries + 1)] == waits
    assert made.waits() == tuple(sorted(set(waits) - {0}))


@pytest.mark.parametrize("multiplier", [2.0, 4, 1e300])
def test_a_wait_never_overflows(multiplier: float) -> None:
    policy = RetryPolicy(max_retries=10**9, multiplier=multiplier)
    assert policy.wait(100_000) == 300.0
    assert RetryPolicy(backoff=0, multiplier=multiplier).wait(100_000) == 0.0


def test_retrying_for_ever_has_few_waits() -> None:
    assert RetryPolicy(max_retries=10**12).waits() == (1.0, 4.0, 16.0, 64.0, 256.0, 300.0)
    assert RetryPolicy(max_retries=10**12, immediate=10**11, backoff=7, multiplier=1).waits() == (7.0,)
    assert RetryPolicy(max_retries=10**12, backoff=0).waits() == ()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_retries": -1}, "max_retries=-1"),
        ({"backoff": -0.1}, "backoff=-0.1"),
        ({"multiplier": 0.5}, r"multiplier=0.5\): use 1 or more"),
        ({"max_backoff": -1}, "max_backoff=-1"),
        ({"max_backoff": math.inf}, "max_backoff=inf"),
        ({"backoff": math.nan}, "backoff=nan"),
        ({"backoff": 600}, r"backoff=600\) is above max_backoff=300"),
        ({"immediate": -1}, "immediate=-1"),
        ({"jitter": -0.1}, "jitter=-0.1"),
        ({"jitter": 1.1}, "use a share from 0 to 1"),
        ({"crash_limit": 0}, "crash_limit=0"),
        ({"retry_on": [ValueError]}, "retry_on.*use a tuple of exception classes"),
        ({"give_up_on": (ValueError, "KeyError")}, "give_up_on.*use a tuple of exception classes"),
        ({"give_up_on": (int,)}, "give_up_on.*use a tuple of exception classes"),
    ],
)
def test_wrong_policies(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RetryPolicy(**wrong)


THREE = RetryPolicy(max_retries=3, backoff=1, multiplier=5, retry_on=(ValueError, OSError), give_up_on=(TimeoutError,))


@pytest.mark.parametrize(
    ("failures", "error", "action", "delay", "reason"),
    [
        (0, None, Action.ACK, 0, ""),
        (9, None, Action.ACK, 0, ""),
        (0, ValueError(), Action.RETRY, 1, ""),
        (1, ValueError(), Action.RETRY, 5, ""),
        (2, ValueError(), Action.RETRY, 25, ""),
        (3, ValueError(), Action.DEAD_LETTER, 0, RETRIES_EXHAUSTED),
        (9, ValueError(), Action.DEAD_LETTER, 0, RETRIES_EXHAUSTED),
        (0, ConnectionError(), Action.RETRY, 1, ""),
        (0, TimeoutError(), Action.DEAD_LETTER, 0, NON_RETRYABLE),
        (0, KeyError(), Action.DEAD_LETTER, 0, NON_RETRYABLE),
        (9, KeyError(), Action.DEAD_LETTER, 0, NON_RETRYABLE),
        (0, DeadLetter("negative total"), Action.DEAD_LETTER, 0, NON_RETRYABLE),
        (0, Discard("nothing to pay"), Action.DISCARD, 0, "nothing to pay"),
        (9, Discard(), Action.DISCARD, 0, ""),
        (0, Retry("closed"), Action.RETRY, 1, ""),
        (1, Retry("closed", delay=600), Action.RETRY, 600, ""),
        (1, Retry("closed", delay=0), Action.RETRY, 0, ""),
        (3, Retry("closed", delay=600), Action.DEAD_LETTER, 0, RETRIES_EXHAUSTED),
    ],
)
def test_decide(failures: int, error: BaseException | None, action: Action, delay: float, reason: str) -> None:
    assert decide(THREE, failures, error) == Verdict(action, delay, reason, error)


@pytest.mark.parametrize(("max_retries", "runs"), [(0, 1), (1, 2), (3, 4)])
def test_max_retries_is_one_less_than_the_runs(max_retries: int, runs: int) -> None:
    policy = RetryPolicy(max_retries=max_retries)
    done = next(n for n in range(100) if decide(policy, n, ERROR).action is Action.DEAD_LETTER)
    assert done + 1 == runs


@pytest.mark.parametrize(("random", "delay"), [(0.0, 1.0), (0.5, 1.1), (1.0, 1.2)])
def test_jitter_only_lengthens(random: float, delay: float) -> None:
    verdict = decide(RetryPolicy(jitter=0.2), 0, ERROR, random=lambda: random)
    assert verdict.delay == pytest.approx(delay)


def test_an_explicit_delay_has_no_jitter() -> None:
    assert decide(RetryPolicy(jitter=1), 0, Retry(delay=10), random=lambda: 1.0).delay == 10


@given(st.integers(0, 30), st.floats(0, 1), st.floats(0, 1), st.integers(0, 40))
def test_a_delay_is_a_floor(failures: int, jitter: float, random: float, retries: int) -> None:
    policy = RetryPolicy(max_retries=retries, jitter=jitter)
    verdict = decide(policy, failures, ERROR, random=lambda: random)
    if verdict.action is Action.RETRY:
        assert policy.wait(failures + 1) in policy.waits()
        assert policy.wait(failures + 1) <= verdict.delay <= policy.waits()[-1] * (1 + jitter)
    else:
        assert failures >= retries


@pytest.mark.parametrize("delay", [-1, math.inf, math.nan])
def test_a_wrong_delay_is_refused_where_it_is_raised(delay: float) -> None:
    with pytest.raises(ValueError, match="use seconds, 0 or more"):
        Retry(delay=delay)


def test_batch_failed_counts() -> None:
    errors: dict[int, BaseException] = {1: ERROR}
    failed = BatchFailed(errors)
    errors.clear()
    assert failed.errors == {1: ERROR}
    assert str(failed) == "1 messages of the batch failed"


def test_constants() -> None:
    assert Verdict(Action.ACK) == ACK
    assert Verdict(Action.RELEASE) == RELEASE
    assert CRASH_LOOP == "crash_loop"


@pytest.mark.parametrize(
    ("deliveries", "crash_count", "suspicion"),
    [
        (None, 0, Suspicion.NONE),
        (1, 0, Suspicion.NONE),
        (3, 0, Suspicion.NONE),
        (4, 0, Suspicion.MARK),
        (99, 0, Suspicion.MARK),
        (None, 1, Suspicion.ALONE),
        (0, 1, Suspicion.ALONE),
        (1, 1, Suspicion.ALONE),
        (2, 1, Suspicion.MARK),
        (2, 2, Suspicion.MARK),
        (1, 3, Suspicion.ALONE),
        (2, 3, Suspicion.DEAD),
        (2, 9, Suspicion.DEAD),
    ],
)
def test_the_crash_guard(deliveries: int | None, crash_count: int, suspicion: Suspicion) -> None:
    assert suspect(deliveries, crash_count, 3) is suspicion


def test_a_copy_that_was_given_back_without_a_run_has_crashed_nothing() -> None:
    assert suspect(2, 1, 3, spare=1) is Suspicion.ALONE
    assert suspect(3, 1, 3, spare=1) is Suspicion.MARK
    assert suspect(3, 3, 3, spare=1) is Suspicion.DEAD
    assert suspect(4, 0, 3, spare=1) is Suspicion.MARK


def test_a_message_that_always_kills_its_consumer_ends() -> None:
    runs, crashes, deliveries = 0, 0, 0
    while True:
        deliveries += 1
        match suspect(deliveries, crashes, 3):
            case Suspicion.DEAD:
                break
            case Suspicion.MARK:
                crashes, deliveries = crashes + 1, 0
            case _:
                runs += 1
    assert runs == 3 + 3  # before it is suspected, and alone
