"""For all tests on whatever they need."""

from __future__ import annotations

import signal
from collections.abc import Generator
from typing import Any

import pytest

# A shell has what it runs in the background ignore Ctrl-C, and so would the services that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(settings: Any) -> Generator[None, bool, bool]:
    """A timeout comes again as long as the test is not over: an event loop swallows what is raised in one of its callbacks, and may lose the
    task that was to be woken, for which the loop's end then waits.
    """
    done = yield
    if settings.method == "signal":
        signal.setitimer(signal.ITIMER_REAL, settings.timeout, settings.timeout)
    return done
