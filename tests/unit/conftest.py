"""Fixtures of the tests of the command line; and how hypothesis runs: time decides nothing, since a machine may be busy."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tests.unit.cli_lab import Cli

from unibus import memory

settings.register_profile("unibus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unibus")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """In an empty folder, on a memory broker of its own; what was imported from there is forgotten afterwards."""
    for name in [name for name in os.environ if name.startswith("UNIBUS_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(memory, "_shared", {})
    yield Cli(tmp_path)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{tmp_path}/"):
            del sys.modules[name]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, stdout counts as a terminal."""
    return lambda: monkeypatch.setattr("unibus.cli.output.piped", lambda: False)
