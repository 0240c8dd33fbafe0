"""Layers wrap the handling of one message: functions from handler to handler, composed once at start."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from unibus.delivery import Delivery

Handling = Callable[[Delivery[Any]], Awaitable[object]]
Layer = Callable[[Handling], Handling]


def compose(handling: Handling, layers: Sequence[Layer]) -> Handling:
    """`layers[0]` is the outermost. No layers, no cost."""
    for layer in reversed(layers):
        handling = layer(handling)
    return handling
