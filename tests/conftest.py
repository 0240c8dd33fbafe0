"""For all tests on whatever they need."""

from __future__ import annotations

import signal

# A shell has what it runs in the background ignore Ctrl-C, and so would the services that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
