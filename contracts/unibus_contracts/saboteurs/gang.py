"""All saboteurs, by chapter, and all hardships."""

from . import carrying, hard, places, receiving, sending, settling, telling  # noqa: F401  # each enlists its saboteurs
from .base import HARDSHIPS, SABOTEURS

__all__ = ["HARDSHIPS", "SABOTEURS"]
