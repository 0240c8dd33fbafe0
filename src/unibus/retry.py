"""What becomes of a message after its handler: a pure function from policy and failure to a verdict.

The idea is NServiceBus' recoverability policy: decide without I/O, then let the core act.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from unibus.errors import ConfigError
from unibus.message import CRASH_COUNT

if TYPE_CHECKING:
    from unibus.delivery import Delivery


class Retry(Exception):  # a fate, not an error
    """Raise in a handler: a failed attempt. `delay`: seconds until the next one, default the policy's."""

    def __init__(self, reason: str = "", *, delay: float | None = None) -> None:
        if delay is not None and not 0 <= delay < float("inf"):
            raise ValueError(f"Retry(delay={delay}): use seconds, 0 or more")
        super().__init__(reason)
        self.delay = delay


class DeadLetter(Exception):  # a fate, not an error
    """Raise in a handler: to the dead-letter channel at once, whatever the policy says."""


class Discard(Exception):  # a fate, not an error
    """Raise in a handler: the message is counted, logged and gone. Not a failure."""


class BatchFailed(Exception):  # says which messages failed; the others succeeded
    """Raise in a `batch=n` handler: the messages at these indices failed, the others are done."""

    def __init__(self, errors: Mapping[int, BaseException]) -> None:
        super().__init__(f"{len(errors)} messages of the batch failed")
        self.errors = dict(errors)


class Postponed(Exception):
    """Raised around a handler, by the core: it did not run, or it can't be recorded that it did. Again after `delay` seconds, uncounted."""

    def __init__(self, delay: float, reason: str) -> None:
        super().__init__(reason)
        self.delay = delay


class Repeated(Exception):
    """Raised around a handler, by the core: this message was handled before, so its handler did not run. An ack."""


class Action(Enum):
    """The fates of a delivery. The first four are the user's words; the others are the core's."""

    ACK = "ack"
    RETRY = "retry"
    DEAD_LETTER = "dead letter"
    DISCARD = "discard"
    RELEASE = "release"  # given back, uncounted
    INVALID = "invalid"  # can't be decoded: to the invalid-message channel
    WAIT = "wait"  # held here and offered again, uncounted


# Values of x-dlq-reason.
RETRIES_EXHAUSTED = "retries_exhausted"
NON_RETRYABLE = "non_retryable"
UNDECODABLE = "undecodable"
EXPIRED = "expired"
CRASH_LOOP = "crash_loop"
BROKER_LIMIT = "broker_limit"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision. `delay` in seconds for RETRY; `reason` a value of x-dlq-reason, or the user's words for DISCARD."""

    action: Action
    delay: float = 0.0
    reason: str = ""
    error: BaseException | None = None


ACK = Verdict(Action.ACK)
RELEASE = Verdict(Action.RELEASE)
REPEATED = Verdict(Action.ACK, reason="handled before")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often, and after which waits, a failed message is tried again before it is a dead letter.

    `max_retries=3` is up to four runs. The first `immediate` retries don't wait; the next ones wait `backoff` seconds,
    then `backoff * multiplier`, and so on up to `max_backoff`. `jitter` (0 to 1) lengthens each wait by up to that share
    of it. Only exceptions of `retry_on` and not of `give_up_on` are retried. A message that was handed out again and again
    without an answer is suspected of killing its consumer: it then runs alone, `crash_limit` times at most.
    """

    max_retries: int = 5
    backoff: float = 1.0
    multiplier: float = 4.0
    max_backoff: float = 300.0
    jitter: float = 0.0
    immediate: int = 0
    crash_limit: int = 3
    retry_on: tuple[type[BaseException], ...] = (BaseException,)
    give_up_on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        for name, low in (("max_retries", 0), ("backoff", 0), ("multiplier", 1), ("max_backoff", 0), ("immediate", 0)):
            if not low <= getattr(self, name) < float("inf"):
                raise ConfigError(f"RetryPolicy({name}={getattr(self, name)}): use {low} or more")
        if self.backoff > self.max_backoff:  # else the first wait would be shorter than what was asked for
            raise ConfigError(
                f"RetryPolicy(backoff={self.backoff}) is above max_backoff={self.max_backoff}; raise that too"
            )
        for name in ("retry_on", "give_up_on"):  # a list would only fail when the first handler does
            kinds = getattr(self, name)
            if not isinstance(kinds, tuple) or not all(
                isinstance(k, type) and issubclass(k, BaseException) for k in kinds
            ):
                raise ConfigError(f"RetryPolicy({name}={kinds!r}): use a tuple of exception classes")
        if not 0 <= self.jitter <= 1:
            raise ConfigError(f"RetryPolicy(jitter={self.jitter}): use a share from 0 to 1")
        if self.crash_limit < 1:
            raise ConfigError(f"RetryPolicy(crash_limit={self.crash_limit}): use 1 or more")

    def wait(self, failures: int) -> float:
        """Seconds to wait after this many failures (1 or more), without jitter."""
        step = failures - 1 - self.immediate
        if step < 0:
            return 0.0
        try:
            return min(self.backoff * self.multiplier**step, self.max_backoff)
        except OverflowError:
            return self.max_backoff if self.backoff else 0.0

    def waits(self) -> tuple[float, ...]:
        """All the different waits this policy can ask for, ascending: known at start, so that a topology can hold them."""
        found: list[float] = []
        for n in range(self.immediate + 1, self.max_retries + 1):  # max_retries may stand for "for ever"
            wait = self.wait(n)
            if not wait or (found and wait <= found[-1]):
                break
            found.append(wait)
        return tuple(found)


def decide(
    policy: RetryPolicy, failures: int, error: BaseException | None, *, random: Callable[[], float] = random.random
) -> Verdict:
    """The verdict on one run. `failures`: failed runs before this one. Pure but for `random`, used for jitter only."""
    if error is None:
        return ACK
    if isinstance(error, Repeated):
        return REPEATED
    if isinstance(error, Postponed):
        return Verdict(Action.WAIT, delay=error.delay, reason=str(error))
    if isinstance(error, Discard):
        return Verdict(Action.DISCARD, reason=str(error), error=error)
    if isinstance(error, DeadLetter):
        return Verdict(Action.DEAD_LETTER, reason=NON_RETRYABLE, error=error)
    explicit = isinstance(error, Retry)
    if not explicit and (isinstance(error, policy.give_up_on) or not isinstance(error, policy.retry_on)):
        return Verdict(Action.DEAD_LETTER, reason=NON_RETRYABLE, error=error)
    if failures >= policy.max_retries:
        return Verdict(Action.DEAD_LETTER, reason=RETRIES_EXHAUSTED, error=error)
    if isinstance(error, Retry) and error.delay is not None:
        return Verdict(Action.RETRY, delay=error.delay, error=error)
    wait = policy.wait(failures + 1)
    return Verdict(Action.RETRY, delay=wait * (1 + policy.jitter * random()) if policy.jitter else wait, error=error)


class Suspicion(Enum):
    """What the crash guard makes of a delivery."""

    NONE = "none"
    MARK = "mark"  # send a copy with x-crash-count + 1, then settle this one
    ALONE = "alone"  # run it with nothing else in hand
    DEAD = "dead"  # it has had its runs alone: a dead letter, crash_loop


SUSPECT_AFTER = 3  # deliveries without an answer


def handed_out_often(delivery: Delivery[Any], times: int = SUSPECT_AFTER) -> bool:
    """Is it better given back as a fresh copy? Where giving back counts, nothing but restarts would make it a suspect."""
    return (delivery.deliveries or 0) >= times or CRASH_COUNT in delivery.message.headers


def suspect(deliveries: int | None, crash_count: int, limit: int, spare: int = 0) -> Suspicion:
    """The crash guard. `deliveries`: how often the broker handed this copy out; None where it doesn't count.

    `spare`: so many hand-outs of a copy may have been ours, given back without a run. A native count only raises suspicion:
    prefetching, restarts and people looking at a queue raise it as well.
    """
    if crash_count == 0:
        return Suspicion.MARK if deliveries is not None and deliveries > SUSPECT_AFTER else Suspicion.NONE
    if deliveries is not None and deliveries > 1 + spare:  # this copy was run alone, and no answer came
        return Suspicion.MARK if crash_count < limit else Suspicion.DEAD
    return Suspicion.ALONE
