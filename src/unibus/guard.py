"""The crash guard: a message that was handed out again and again without an answer may be what kills its consumers.

It is copied with its count raised, and the copy runs with nothing else in this process' hands, so that what the next crash
takes down with it keeps its innocence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from unibus import deadletter, retry
from unibus.adapter import Outgoing
from unibus.channel import Group, Queue
from unibus.delivery import Delivery
from unibus.message import CRASH_COUNT
from unibus.report import Report
from unibus.retry import Action, Suspicion, Verdict
from unibus.settler import Settler


class CrashGuard:
    """Of one intake. `alone`: it is at work, one delivery at a time is in our hands. `suspects`: found before it was.

    `limit`: runs alone, after which a suspect is a dead letter, by `finish`. `spare`: hand-outs of a copy before its run that
    are no evidence, since changing to `alone` may have cost them.
    """

    def __init__(
        self,
        address: Queue[Any] | Group,
        limit: int,
        settler: Settler,
        report: Report,
        finish: Callable[[Delivery[Any], Verdict], None],
        *,
        spare: int = 0,
    ) -> None:
        self.alone = False
        self.suspects: list[Delivery[Any]] = []
        self.trusted = 0  # deliveries in a row that were no suspects
        self._address = address
        self._limit = limit
        self._settler = settler
        self._report = report
        self._finish = finish
        self._spare = spare

    def trusts(self, delivery: Delivery[Any], crashes: int) -> bool:
        """May it be handed out now? If not, it is on its way to another place. `crashes`: its count so far."""
        match retry.suspect(delivery.deliveries, crashes, self._limit, self._spare):
            case Suspicion.NONE:
                return True
            case Suspicion.ALONE if self.alone:
                self.trusted = 0
                return True
            case Suspicion.ALONE:
                self.suspects.append(delivery)
            case Suspicion.MARK:
                self._report.suspect(delivery)
                self._send_back(delivery, crashes + 1)
            case Suspicion.DEAD:
                self._finish(delivery, Verdict(Action.DEAD_LETTER, reason=retry.CRASH_LOOP))
        return False

    def send_back(self, suspects: Sequence[Delivery[Any]]) -> None:
        """They come again, when `alone` has begun."""
        for suspect in suspects:
            self._send_back(suspect, deadletter.crash_count(suspect.message.headers))

    def _send_back(self, delivery: Delivery[Any], crashes: int) -> None:
        headers = {**delivery.message.headers, CRASH_COUNT: str(crashes)}
        delivery.settled = True
        self._settler.move(
            delivery, Outgoing(self._address, deadletter.copy(delivery.message, headers), None, delivery)
        )
