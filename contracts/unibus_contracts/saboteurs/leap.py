"""A pytest plugin for brokers inside this process: `-p unibus_contracts.saboteurs.leap`. Nobody waits, time leaps.

Where the event loop has nothing to do until its next timer, the clocks of this process are put forward to it. So a contract
keeps all its deadlines, a sabotaged one that waits in vain for ten seconds costs a few milliseconds, and a slow machine
changes nothing. As soon as anything outside the loop may speak, a thread or a child, time passes as usual.
"""

from __future__ import annotations

import selectors
import sys
import threading
import time
from typing import Any

_time, _monotonic = time.time, time.monotonic
_ahead = 0.0  # seconds that our clocks are before those of the machine


def _now() -> float:
    return _time() + _ahead


def _running() -> float:
    return _monotonic() + _ahead


class LeapingSelector(selectors.DefaultSelector):
    """What an event loop waits with."""

    def select(self, timeout: float | None = None) -> Any:
        global _ahead  # noqa: PLW0603  # one time for the whole process is the point
        if timeout is None or timeout <= 0 or self._others():
            return super().select(timeout)
        ready = super().select(0)
        if not ready:
            _ahead += timeout
        return ready

    def _others(self) -> bool:
        """More than this thread, or more to listen to than the loop's own pipe?"""
        return threading.active_count() > 1 or len(self.get_map()) > 1


if "unibus.clock" in sys.modules:
    raise ImportError("unibus has been imported before its clock could be replaced: load this plugin by -p")
time.time, time.monotonic = _now, _running
selectors.DefaultSelector = LeapingSelector  # type: ignore[misc]  # for the loops to come
