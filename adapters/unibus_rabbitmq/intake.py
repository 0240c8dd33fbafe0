"""From frames to deliveries: basic.deliver, its header, its body."""

from __future__ import annotations

from collections.abc import Callable

from unibus_rabbitmq import frames, wire


class Intake:
    """The sink of a consumer's channel. `closing` is called when the server closes the channel, before aiormq knows."""

    def __init__(self, arrived: Callable[[wire.Received], None], closing: Callable[[], None]) -> None:
        self._arrived = arrived
        self._closing = closing
        self._method = b""  # of a delivery whose header is still coming
        self._incoming: wire.Received | None = None  # one whose body is still coming
        self._parts: list[bytes] = []
        self._left = 0

    def frame(self, kind: int, payload: bytes) -> bool:
        if kind == frames.METHOD:
            if payload[:4] == frames.DELIVER:
                self._method = payload
                return True
            if payload[:4] == frames.CHANNEL_CLOSE:
                self._closing()
            return False
        if kind == frames.HEADER:
            if not self._method:
                return False
            tag, redelivered, names_at = frames.read_deliver(self._method)
            received = wire.Received(tag, redelivered, self._method, names_at, payload)
            self._method = b""
            self._left = frames.body_size(payload)
            if self._left:
                self._incoming = received
            else:
                self._arrived(received)
            return True
        incoming = self._incoming
        if incoming is None:
            return False
        self._left -= len(payload)
        if self._left > 0 or self._parts:
            self._parts.append(payload)
        if self._left <= 0:
            incoming.body = b"".join(self._parts) if self._parts else payload
            self._parts = []
            self._incoming = None
            self._arrived(incoming)
        return True
