"""What becomes of a message, counted and logged: nothing leaves its queue without its handler's consent and a trace.

Each failed attempt and each discard is one record, with these attributes beside its text, for logs that are searched:
`channel`, `group` (None on a queue), `message_id`, `correlation_id`, `attempt`, `verdict` (retry, dead letter, discard,
invalid, answered, lost, suspected), `delay` (seconds, None unless it is tried again), `reason`, `error_type`. Never a body, a header or a key.
Deliveries that could not be settled are one record together: `channel`, `group`, `number`, and the `message_id` of the first.
"""

from __future__ import annotations

import logging
from typing import Any

from unibus import retry, telemetry
from unibus.channel import Address, Group, Queue
from unibus.deadletter import describe
from unibus.delivery import Delivery
from unibus.retry import Action, Verdict
from unibus.telemetry import Counts, names_of

log = logging.getLogger("unibus")

ANSWERED = "answered"  # a request, with an error
LOST = "lost"  # its outcome does not count: settled before, or no longer ours


def extra(
    address: Address, delivery: Delivery[Any], verdict: str, error: BaseException | None, **more: object
) -> dict[str, object]:
    """The attributes of a record about one delivery. `more`: delay, reason."""
    message = delivery.message
    return {
        **names_of(address),
        "message_id": message.id,
        "correlation_id": message.correlation_id,
        "attempt": delivery.attempt,
        "verdict": verdict,
        "delay": more.get("delay"),
        "reason": more.get("reason") or None,
        "error_type": None if error is None else type(error).__qualname__,
    }


class Report:
    """Of one address. `private`: a broadcast, which has no dead letters."""

    def __init__(self, counts: Counts, address: Queue[Any] | Group, *, private: bool) -> None:
        self._counts = counts
        self._address = address
        self._private = private

    def verdict(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        """Everything but the ack of a run, which is only counted."""
        error, reason, action = verdict.error, verdict.reason, verdict.action
        what = describe(error)
        by_word = isinstance(error, (retry.Retry, retry.DeadLetter, retry.Discard))
        traceback = None if by_word else error
        where, message_id = self._address, delivery.message.id
        delay = verdict.delay if action in {Action.RETRY, Action.WAIT} else None
        more = extra(where, delivery, action.value, error, delay=delay, reason=reason)
        if action is Action.ACK:
            self.count(telemetry.REPEATED)
            text = "%s: message %s was handled before; acked without its handler"
            log.info(text, where, message_id, extra=more)
        elif action is Action.WAIT:
            self.count(telemetry.POSTPONED)
            log.debug("%s: message %s waits for %g s: %s", where, message_id, verdict.delay, reason, extra=more)
        elif action is Action.RETRY:
            self.count(telemetry.RETRIED)
            text = "%s: attempt %d of message %s failed, again in %g s: %s"
            log.warning(text, where, delivery.attempt, message_id, delay, what, exc_info=traceback, extra=more)
        elif action is Action.DISCARD and (by_word or reason != retry.EXPIRED):  # an expired one is counted as such
            self.count(telemetry.DISCARDED)
            log.info("%s: message %s discarded: %s", where, message_id, reason, extra=more)
        elif action is Action.RELEASE:
            self.count(telemetry.RELEASED)
        elif self._private and action is not Action.DISCARD:
            self.count(telemetry.DISCARDED)
            text = "%s: message %s discarded (%s), since a broadcast has no dead letters: %s"
            more["verdict"] = Action.DISCARD.value
            log.error(text, where, message_id, reason, what, exc_info=traceback, extra=more)
        elif action is Action.INVALID:
            self.count(telemetry.INVALID)
            text = "%s: message %s goes to the invalid-message channel: %s"
            log.error(text, where, message_id, what, extra=more)
        elif action is Action.DEAD_LETTER:
            self.count(telemetry.DEAD_LETTERED)
            text = "%s: message %s is a dead letter (%s): %s"
            log.error(text, where, message_id, reason, what, exc_info=traceback, extra=more)

    def expired_request(self, delivery: Delivery[Any]) -> None:
        text = "%s: request %s expired before it was handled; dropped"
        more = extra(self._address, delivery, Action.DISCARD.value, None, reason=retry.EXPIRED)
        log.info(text, self._address, delivery.message.id, extra=more)

    def too_late(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        """A run failed whose message was settled by hand, or is no longer ours."""
        if (error := verdict.error) is not None:
            why = "it is no longer ours" if delivery.lost else "it was settled before"
            more = extra(self._address, delivery, LOST, error, reason=why)
            text = "%s: attempt %d of message %s failed, but %s: %s"
            log.error(text, self._address, delivery.attempt, delivery.message.id, why, describe(error), extra=more)

    def at_most_once(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        """The end of a message that was settled before its run."""
        error, message_id = verdict.error, delivery.message.id
        more = extra(self._address, delivery, Action.DISCARD.value, error, reason="at most once")
        if verdict.action is Action.RELEASE:
            text = "%s: message %s was settled first (at most once) and did not run to its end; it does not come again"
            log.error(text, self._address, message_id, extra=more)
        elif isinstance(error, retry.Discard):
            log.info("%s: message %s discarded: %s", self._address, message_id, verdict.reason, extra=more)
        elif verdict.action is not Action.ACK:
            text = "%s: message %s was settled first (at most once) and failed; it does not come again: %s"
            log.error(text, self._address, message_id, describe(error), exc_info=error, extra=more)
        self.count(telemetry.HANDLED if verdict.action is Action.ACK else telemetry.DISCARDED)

    def lost(self, delivery: Delivery[Any], consequence: str) -> None:
        """Before it was settled."""
        self.count(telemetry.LEASE_LOST)
        text = "%s: message %s is no longer ours and comes again, here or elsewhere; %s"
        more = extra(self._address, delivery, LOST, None, reason=consequence)
        log.warning(text, self._address, delivery.message.id, consequence, extra=more)

    def overdue(self, delivery: Delivery[Any]) -> None:
        """It had not begun. Whether it was lost is known, and counted, once it is given back."""
        text = "%s: the lease of message %s has ended while it waited; not begun but given back, it comes again, here or elsewhere"
        more = extra(self._address, delivery, LOST, None, reason="its lease has ended while it waited")
        log.warning(text, self._address, delivery.message.id, extra=more)

    def suspect(self, delivery: Delivery[Any]) -> None:
        self.count(telemetry.SUSPECTED)
        text = "%s: message %s was handed out %s times without an answer; its next run is alone"
        more = extra(self._address, delivery, telemetry.SUSPECTED, None, reason="crash guard")
        log.warning(text, self._address, delivery.message.id, delivery.deliveries, extra=more)

    def count(self, event: str) -> None:
        self._counts.add(event, self._address)
