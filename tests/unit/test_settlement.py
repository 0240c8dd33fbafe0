"""From a verdict to a step, and what is refused at start, as tables."""

from typing import Any

import pytest

from unibus.capabilities import Capabilities, Support, native, refused
from unibus.errors import ConfigError, Unsupported
from unibus.retry import ACK, RELEASE, Action, RetryPolicy, Verdict
from unibus.settlement import Place, Step, check_policy, plan

OPEN, ORDERED, PRIVATE = Place(), Place(ordered=True), Place(private=True)
FEATURES = (
    *("order", "delay", "priority", "replay", "browse", "reply", "release", "lease", "atomic_move", "delivery_count"),
    *("attempt", "settle_confirmed", "dedup"),
    "share",
    "inbox",
)


def broker(**facts: Any) -> Capabilities:
    features: dict[str, Any] = dict.fromkeys(FEATURES, native())
    return Capabilities(adapter="abacus", **(features | facts))


def retry(delay: float) -> Verdict:
    return Verdict(Action.RETRY, delay)


DEAD, INVALID, DISCARD = Verdict(Action.DEAD_LETTER), Verdict(Action.INVALID), Verdict(Action.DISCARD)


@pytest.mark.parametrize(
    ("verdict", "place", "park_below", "step"),
    [
        (ACK, OPEN, 0, Step.SETTLE),
        (ACK, ORDERED, 0, Step.SETTLE),
        (ACK, PRIVATE, 0, Step.SETTLE),
        (DISCARD, OPEN, 0, Step.SETTLE),
        (RELEASE, OPEN, 0, Step.RELEASE),
        (RELEASE, ORDERED, 0, Step.RELEASE),
        (RELEASE, PRIVATE, 0, Step.RELEASE),
        (retry(0), OPEN, 0, Step.PARK),
        (retry(0.001), OPEN, 0, Step.MOVE),
        (retry(9.9), OPEN, 10, Step.PARK),
        (retry(10), OPEN, 10, Step.MOVE),
        (retry(600), ORDERED, 0, Step.PARK),
        (retry(600), PRIVATE, 0, Step.PARK),
        (DEAD, OPEN, 0, Step.MOVE),
        (DEAD, ORDERED, 0, Step.MOVE),
        (DEAD, PRIVATE, 0, Step.SETTLE),
        (INVALID, OPEN, 0, Step.MOVE),
        (INVALID, ORDERED, 0, Step.MOVE),
        (INVALID, PRIVATE, 0, Step.SETTLE),
    ],
)
def test_plan(verdict: Verdict, place: Place, park_below: float, step: Step) -> None:
    assert plan(verdict, place, broker(park_below=park_below)) is step


@pytest.mark.parametrize("action", Action)
@pytest.mark.parametrize("place", [OPEN, ORDERED, PRIVATE, Place(ordered=True, private=True)])
def test_every_action_has_a_step(action: Action, place: Place) -> None:
    assert plan(Verdict(action), place, broker()) in Step


LONG = RetryPolicy(max_retries=2, backoff=100, multiplier=10, max_backoff=1000)
NONE = RetryPolicy(max_retries=0)
AT_ONCE = RetryPolicy(backoff=0)
NO_DELAY = refused("it has no timers")


@pytest.mark.parametrize(
    ("policy", "place", "facts"),
    [
        (LONG, OPEN, {}),
        (LONG, OPEN, {"delay": native(limit=1000)}),
        (LONG, ORDERED, {"park_limit": 1000, "delay": NO_DELAY}),
        (LONG, PRIVATE, {"park_limit": None, "delay": NO_DELAY}),
        (LONG, OPEN, {"park_limit": 1}),
        (LONG, OPEN, {"park_below": 1001, "delay": NO_DELAY}),
        (NONE, OPEN, {"delay": NO_DELAY}),
        (AT_ONCE, OPEN, {"delay": NO_DELAY}),
        (AT_ONCE, ORDERED, {"park_limit": 0.0}),
        (RetryPolicy(jitter=0.1), OPEN, {}),
        (RetryPolicy(jitter=0.1), ORDERED, {"delay_steps": True}),
        (RetryPolicy(), OPEN, {"delay_steps": True}),
    ],
)
def test_policies_that_a_broker_can_carry_out(policy: RetryPolicy, place: Place, facts: dict[str, Any]) -> None:
    check_policy(policy, place, broker(**facts), "queue 'orders'")


@pytest.mark.parametrize(
    ("policy", "place", "facts", "error", "said"),
    [
        (RetryPolicy(jitter=0.1), OPEN, {"delay_steps": True}, ConfigError, "retry.jitter=0.1.*use jitter=0"),
        (LONG, ORDERED, {"park_limit": 999.0}, Unsupported, "waits up to 1000 s in place.*999 s at most"),
        (LONG, PRIVATE, {"park_limit": 999.0}, Unsupported, "lower retry.max_backoff"),
        (
            LONG,
            OPEN,
            {"delay": NO_DELAY},
            Unsupported,
            r"can't delay a retry \(it has no timers\); use retry.backoff=0",
        ),
        (LONG, OPEN, {"delay": native(limit=900.0)}, Unsupported, "delays by 900 s at most"),
        (
            RetryPolicy(max_retries=1, backoff=100, jitter=0.5),
            OPEN,
            {"delay": native(limit=120.0)},
            Unsupported,
            "waits up to 150 s",
        ),
    ],
)
def test_policies_refused_at_start(
    policy: RetryPolicy, place: Place, facts: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        check_policy(policy, place, broker(**facts), "queue 'orders'")
    assert str(caught.value).startswith("queue 'orders': ")
    assert "abacus" in str(caught.value)


def test_features_lists_all_of_them() -> None:
    features = broker(delay=NO_DELAY).features()
    assert tuple(features) == FEATURES
    assert all(isinstance(value, Support) for value in features.values())
    assert not features["delay"]
    assert features["order"]
