"""All saboteurs, by chapter."""

from . import carrying, places, receiving, sending, settling, telling  # noqa: F401  # each enlists its saboteurs
from .base import SABOTEURS

__all__ = ["SABOTEURS"]
