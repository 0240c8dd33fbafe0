"""Stores of what was handled, for `idempotency=`: in memory here; `unibus.stores.redis` and `unibus.stores.sql` need their clients."""

from unibus.idempotency import Key, Standing, Store, StoreUnavailable, Transactional, Work
from unibus.stores.memory import MemoryStore

__all__ = ["Key", "MemoryStore", "Standing", "Store", "StoreUnavailable", "Transactional", "Work"]
