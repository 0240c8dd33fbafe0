"""What an application does with its channels: these rows of a comparison come first."""

from __future__ import annotations

from unibus import Bus, Queue, Topic
from unibus.tooling import attached


def touched(bus: Bus) -> set[str]:
    """Words of `model.Touch`. Raises ConfigError."""
    _, channels = attached(bus)._load()
    found: set[str] = set()
    for channel in channels:
        found.add("topic" if isinstance(channel, Topic) else "queue")
        features = {
            "ordered": channel.ordered,
            "delayed": channel.delayed,
            "priorities": channel.priorities,
            "reply": isinstance(channel, Queue) and channel.reply is not None,
        }
        found |= {name for name, used in features.items() if used}
    if any(registration.kind != "responder" for registration in bus.registrations):
        found.add("retry")
    if any(registration.kind == "responder" for registration in bus.registrations):
        found.add("reply")
    return found
