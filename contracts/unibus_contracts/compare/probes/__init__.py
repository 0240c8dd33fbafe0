"""The probes, one topic a file. A new one is a file with `PROBES` and a line here."""

from __future__ import annotations

from ..model import Declared, Probe
from . import cost, crash, delays, fanout, flow, load, order, receiving, reply, retries, sending, sizes

ALL: tuple[Probe | Declared, ...] = tuple(
    probe
    for module in (load, flow, sending, receiving, order, retries, crash, delays, fanout, reply, sizes, cost)
    for probe in module.PROBES
)
