"""The entry point of `sabotaged://`: from a URL to the adapter that it names."""

from __future__ import annotations

from unibus.adapter import Endpoint

from .base import HEALTHY, Adapter
from .gang import HARDSHIPS, SABOTEURS


def make(endpoint: Endpoint) -> Adapter:
    name = str(endpoint.settings.get("saboteur", HEALTHY))
    return Adapter(endpoint) if name == HEALTHY else (SABOTEURS | HARDSHIPS)[name].adapter(endpoint)
