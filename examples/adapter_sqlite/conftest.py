"""Where the contracts run: `pytest --pyargs unibus_contracts` in this folder finds this file, and needs no URL."""

from __future__ import annotations

import pytest

from unibus_contracts.harness import UrlHarness


@pytest.fixture(scope="session")
def unibus_harness(tmp_path_factory: pytest.TempPathFactory) -> UrlHarness:
    """A file of its own, which goes with pytest's temporary folders."""
    return UrlHarness(f"sqlite:///{tmp_path_factory.mktemp('broker') / 'broker.db'}")
