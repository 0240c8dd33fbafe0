"""All saboteurs, by chapter."""

from .base import SABOTEURS

from . import carrying, places, receiving, sending, settling, telling  # noqa: F401  # each enlists its saboteurs

__all__ = ["SABOTEURS"]
