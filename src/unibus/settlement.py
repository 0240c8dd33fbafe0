"""From a verdict to the step that carries it out on a broker with given capabilities. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from unibus import deadletter
from unibus.adapter import Outgoing
from unibus.capabilities import Capabilities
from unibus.channel import Group, Queue, dead_letter_queue, invalid_queue
from unibus.delivery import Delivery
from unibus.errors import ConfigError, Unsupported
from unibus.retry import Action, RetryPolicy, Verdict


class Step(Enum):
    SETTLE = "settle"  # tell the broker that it is done
    RELEASE = "release"  # give it back to the broker
    MOVE = "move"  # a copy to another place (or later to the same), confirmed, then settle
    PARK = "park"  # hold it here, its lease extended, and run it again after the delay


@dataclass(frozen=True, slots=True)
class Place:
    """What matters of the place a delivery came from. `private`: an ephemeral group, that ends with this process."""

    ordered: bool = False
    private: bool = False


def plan(verdict: Verdict, place: Place, capabilities: Capabilities) -> Step:
    """How to carry out `verdict`.

    On an ordered place every retry parks: a copy would overtake, or be overtaken. A private place can't be sent to and
    has no dead letters. What only waits is held anywhere. Elsewhere a retry is a copy, durable with its count, unless it is due so soon that holding is better.
    """
    match verdict.action:
        case Action.ACK | Action.DISCARD:
            return Step.SETTLE
        case Action.RELEASE:
            return Step.RELEASE
        case Action.WAIT:
            return Step.PARK
        case Action.RETRY:
            soon = verdict.delay <= 0 or verdict.delay < capabilities.park_below
            return Step.PARK if place.ordered or place.private or soon else Step.MOVE
        case Action.DEAD_LETTER | Action.INVALID:
            return Step.SETTLE if place.private else Step.MOVE


def onward(delivery: Delivery[Any], verdict: Verdict, address: Queue[Any] | Group, now: float) -> Outgoing:
    """For a MOVE: the message as it goes to its next place, with the story of its failures. `now`: epoch seconds."""
    if verdict.action is Action.RETRY:
        headers = deadletter.failed(delivery, verdict.error, now)
        return Outgoing(address, deadletter.copy(delivery.message, headers), now + verdict.delay, delivery)
    headers = deadletter.dead(delivery, verdict.reason, verdict.error, now)
    to = invalid_queue(address) if verdict.action is Action.INVALID else dead_letter_queue(address)
    # What is dead doesn't expire: somebody has to look at it.
    return Outgoing(to, deadletter.copy(delivery.message, headers, expires_at=None, priority=None), None, delivery)


def beyond(delay: float, step: Step, capabilities: Capabilities) -> Unsupported | None:
    """Is a retry's own delay longer than this broker can do? A delay is never shortened: the message is a dead letter."""
    name = capabilities.adapter
    if step is Step.PARK and capabilities.park_limit is not None and delay > capabilities.park_limit:
        return Unsupported(f"retry after {delay:g} s: {name} holds a message for {capabilities.park_limit:g} s at most")
    if step is Step.MOVE and not capabilities.delay:
        return Unsupported(f"retry after {delay:g} s: {name} can't delay a message ({capabilities.delay.how})")
    if step is Step.MOVE and capabilities.delay.limit is not None and delay > capabilities.delay.limit:
        return Unsupported(f"retry after {delay:g} s: {name} delays by {capabilities.delay.limit:g} s at most")
    return None


def check_policy(policy: RetryPolicy, place: Place, capabilities: Capabilities, where: str) -> None:
    """Refuse at start what would fail in the middle of a run. Raises ConfigError or Unsupported that name `where`."""
    name = capabilities.adapter
    if policy.jitter and capabilities.delay_steps and not (place.ordered or place.private):
        raise ConfigError(f"{where}: retry.jitter={policy.jitter}, but delays on {name} are fixed steps; use jitter=0")
    waits = policy.waits()
    longest = waits[-1] * (1 + policy.jitter) if waits else 0.0
    if place.ordered or place.private:
        limit = capabilities.park_limit
        if limit is not None and longest > limit:
            raise Unsupported(
                f"{where}: a retry waits up to {longest:g} s in place, and {name} holds a message for {limit:g} s at most; "
                "lower retry.max_backoff"
            )
    elif longest >= max(capabilities.park_below, 1e-9):
        if not capabilities.delay:
            raise Unsupported(f"{where}: {name} can't delay a retry ({capabilities.delay.how}); use retry.backoff=0")
        if capabilities.delay.limit is not None and longest > capabilities.delay.limit:
            raise Unsupported(
                f"{where}: a retry waits up to {longest:g} s, and {name} delays by {capabilities.delay.limit:g} s at most; "
                "lower retry.max_backoff"
            )
