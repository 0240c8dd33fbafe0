"""All contracts of the suite, without running any."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from . import suite
from .contract import Terms

ALWAYS = (
    "A user who may make, inspect, use and delete what begins with the prefix; no other client at work there; a broker that has "
    "memory and disk to spare, and answers within seconds."
)


def catalogue() -> dict[str, tuple[Terms, str]]:
    """Id -> its terms, and where pytest finds it, `unibus_contracts.suite.test_x::test_y`; by chapter."""
    found: dict[str, tuple[Terms, str]] = {}
    for info in sorted(iter_modules(suite.__path__), key=lambda info: info.name):
        module = import_module(f"{suite.__name__}.{info.name}")
        for name, value in vars(module).items():
            terms = getattr(value, "__unibus_contract__", None)
            if isinstance(terms, Terms) and value.__module__ == module.__name__:
                found[terms.id] = (terms, f"{module.__name__}::{name}")
    return found
