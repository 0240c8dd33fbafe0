"""The pytest plugin: options, the fixtures of a contract, and the report. It imports only pytest when it is loaded."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("unibus", "unibus contract suite")
    group.addoption("--unibus-url", metavar="URL", help="the broker to run the contracts on, for example memory://")
    group.addoption("--unibus-report", metavar="FILE", help="write the outcome of every contract to this file, as JSON")
    group.addoption("--unibus-prefix", metavar="TEXT", help="begin every name on the broker with this; default: random")
