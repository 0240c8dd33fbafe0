"""What becomes of a message, counted and logged: nothing leaves its queue without its handler's consent and a trace."""

from __future__ import annotations

import logging
from typing import Any

from unibus import retry, telemetry
from unibus.channel import Group, Queue
from unibus.deadletter import describe
from unibus.delivery import Delivery
from unibus.retry import Action, Verdict
from unibus.telemetry import Counts

log = logging.getLogger("unibus")


class Report:
    """Of one address. `private`: a broadcast, which has no dead letters."""

    def __init__(self, counts: Counts, address: Queue[Any] | Group, *, private: bool) -> None:
        self._counts = counts
        self._address = address
        self._private = private

    def verdict(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        """Everything but the ack of a run, which is only counted."""
        error, reason = verdict.error, verdict.reason
        what = describe(error)
        by_word = isinstance(error, (retry.Retry, retry.DeadLetter, retry.Discard))
        traceback = None if by_word else error
        where, message_id = self._address, delivery.message.id
        if verdict.action is Action.ACK:
            self.count(telemetry.REPEATED)
            log.info("%s: message %s was handled before; acked without its handler", where, message_id)
        elif verdict.action is Action.WAIT:
            self.count(telemetry.POSTPONED)
            log.debug("%s: message %s waits for %g s: %s", where, message_id, verdict.delay, reason)
        elif verdict.action is Action.RETRY:
            self.count(telemetry.RETRIED)
            text = "%s: attempt %d of message %s failed, again in %g s: %s"
            log.warning(text, where, delivery.attempt, message_id, verdict.delay, what, exc_info=traceback)
        elif verdict.action is Action.DISCARD and (
            by_word or reason != retry.EXPIRED
        ):  # an expired one is counted as such
            self.count(telemetry.DISCARDED)
            log.info("%s: message %s discarded: %s", where, message_id, reason)
        elif verdict.action is Action.RELEASE:
            self.count(telemetry.RELEASED)
        elif self._private and verdict.action is not Action.DISCARD:
            self.count(telemetry.DISCARDED)
            text = "%s: message %s discarded (%s), since a broadcast has no dead letters: %s"
            log.error(text, where, message_id, reason, what, exc_info=traceback)
        elif verdict.action is Action.INVALID:
            self.count(telemetry.INVALID)
            log.error("%s: message %s goes to the invalid-message channel: %s", where, message_id, what)
        elif verdict.action is Action.DEAD_LETTER:
            self.count(telemetry.DEAD_LETTERED)
            log.error("%s: message %s is a dead letter (%s): %s", where, message_id, reason, what, exc_info=traceback)

    def expired_request(self, delivery: Delivery[Any]) -> None:
        log.info("%s: request %s expired before it was handled; dropped", self._address, delivery.message.id)

    def too_late(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        """A run failed whose message was settled by hand, or first, or is no longer ours."""
        if verdict.error is not None:
            why = "its message is no longer ours" if delivery.lost else "its message was settled before"
            log.error("%s: failed, but %s: %s", self._address, why, describe(verdict.error))

    def at_most_once(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        """The end of a message that was settled before its run."""
        if verdict.action is Action.RELEASE:
            text = "%s: message %s was settled first (at most once) and did not run to its end; it does not come again"
            log.error(text, self._address, delivery.message.id)
        self.count(telemetry.HANDLED if verdict.action is Action.ACK else telemetry.DISCARDED)

    def suspect(self, delivery: Delivery[Any]) -> None:
        self.count(telemetry.SUSPECTED)
        text = "%s: message %s was handed out %s times without an answer; its next run is alone"
        log.warning(text, self._address, delivery.message.id, delivery.deliveries)

    def count(self, event: str) -> None:
        self._counts.add(event, self._address)
