"""The contracts on a broker that is restarted in the middle, with a command given as a user would give it.

Not SQS: its emulator keeps nothing over a restart, and AWS has none.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator

import pytest

from unibus_contracts import report, runner, supply
from unibus_contracts.catalogue import catalogue
from unibus_contracts.supply import Broker

log = logging.getLogger(__name__)

INSTANCE = "restart"
SECONDS = 600  # half a minute on an idle machine
BEFORE = "from unibus_contracts import supply; import time; broker = supply.start({kind!r}, {instance!r}); "

pytestmark = pytest.mark.timeout(SECONDS)


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """Of this test alone."""
    made = supply.start(request.param, INSTANCE)
    yield made
    made.stop()


def outcomes(broker: Broker, ids: str, how: str, *, scheme: str = "", query: str = "") -> list[str]:
    """Of the contracts whose ids begin so, where this restarts the broker."""
    before = broker.pid
    kind = broker.name.removesuffix(f"-{INSTANCE}")
    command = shlex.join([sys.executable, "-c", BEFORE.format(kind=kind, instance=INSTANCE) + how])
    chosen = {id: place for id, (_, place) in catalogue().items() if id.startswith(ids)}
    given, _, where = broker.url.partition(":")
    url = f"{scheme or given}:{where}{query}"
    found, _ = runner.run(url, lambda _id, _outcome: None, f"--unibus-restart={command}", tests=list(chosen.values()))
    assert broker.pid not in {None, before}
    tried = [entry for entry in found["contracts"] if entry["id"] in chosen]
    log.info("%s", tried)  # with what was wrong
    return [entry["outcome"] for entry in tried]


@pytest.mark.parametrize("broker", ["rabbitmq", "kafka", "redis"], indirect=True)
def test_what_is_promised_of_a_restart(broker: Broker) -> None:
    assert outcomes(broker, "fault.restart_", "broker.restart()") == [report.PASSED] * 2


@pytest.mark.parametrize("broker", ["kafka"], indirect=True)
def test_an_outage_that_is_longer_than_a_session(broker: Broker) -> None:
    """By librdkafka, which joins as somebody new: nobody may wait another session for who it was, and the contract does not."""
    how = "broker.kill(); time.sleep(21); broker.restart()"
    assert outcomes(
        broker, "fault.restart_loses_nothing", how, scheme="kafka+confluent", query="?session_timeout=20"
    ) == [report.PASSED]
