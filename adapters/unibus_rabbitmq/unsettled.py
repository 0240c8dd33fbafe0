"""The delivery tags of one channel that the server counts as unsettled."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from unibus.delivery import Delivery
from unibus_rabbitmq import frames, wire


class Unsettled:
    """Tags in ascending order, each with its delivery once that was given out.

    The server closes the channel on a tag that it does not know (any more), so only what is in here reaches it. Not the
    core's Tracker: the deliveries are needed too, and one ordered table per delivery is enough.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._open: OrderedDict[int, Delivery[Any] | None] = OrderedDict()

    def arrived(self, tag: int) -> None:
        self._open[tag] = None

    def given(self, tag: int, delivery: Delivery[Any]) -> None:
        self._open[tag] = delivery

    def has(self, delivery: Delivery[Any]) -> bool:
        native = delivery.native
        return isinstance(native, wire.Received) and self._open.get(native.tag) is delivery

    def tags(self) -> list[int]:
        return list(self._open)

    def given_out(self) -> list[Delivery[Any]]:
        return [delivery for delivery in self._open.values() if delivery is not None]

    def lose_all(self) -> None:
        """The channel is gone: what was given out is no longer ours."""
        for delivery in self._open.values():
            if delivery is not None:
                delivery.lost = True
        self._open.clear()

    def accept(self, tags: list[int]) -> bytes:
        """The frames that ack these; they are settled from now on.

        One ack for all tags below the first that stays open, which names a tag that is open: the server knows no other.
        """
        self._remove(tags)
        tags.sort()
        first_open = next(iter(self._open), None)
        upto = len(tags)
        if first_open is not None:
            upto = 0
            while upto < len(tags) and tags[upto] < first_open:
                upto += 1
        number = self._number
        parts = [frames.ack_frame(number, tags[upto - 1], True)] if upto else []
        parts += [frames.ack_frame(number, tag, False) for tag in tags[upto:]]
        return b"".join(parts)

    def release(self, tags: list[int]) -> bytes:
        """The frames that give these back to their queue, in their order."""
        self._remove(tags)
        return b"".join(frames.nack_frame(self._number, tag) for tag in sorted(tags))

    def keep(self, deliveries: Iterable[Delivery[Any]]) -> None:
        """Nobody's any more, but unsettled for the server until the channel ends."""
        for delivery in deliveries:
            if self.has(delivery) and isinstance(delivery.native, wire.Received):
                self._open[delivery.native.tag] = None

    def _remove(self, tags: Iterable[int]) -> None:
        for tag in tags:
            del self._open[tag]
