"""A node that hangs (SIGSTOP): its connections stay open, its system acknowledges what is sent to it, and it answers nothing.

So nobody is told. What bounds it is the patience of the client, and the setting that says how long that is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest
from tests.clusters.test_clusters import SOON, Work, elsewhere, eventually, until

from unibus_contracts import supply
from unibus_contracts.chaos import nodes

pytestmark = pytest.mark.timeout(900)


# What the service is told; by default RabbitMQ's links are looked at every 20 s. Redis and Kafka need nothing.
SETTINGS: dict[str, dict[str, object]] = {"rabbitmq": {"heartbeat": 5}, "kafka": {}, "redis": {"wait_replicas": 1}}


@pytest.fixture(params=SETTINGS)
def cluster(request: pytest.FixtureRequest) -> Iterator[supply.Cluster]:
    """Its nodes are stopped, so it is nobody else's."""
    made = supply.cluster(request.param, instance="hanging")
    yield made
    made.stop()


async def test_work_goes_on_elsewhere_while_the_node_in_use_hangs(cluster: supply.Cluster) -> None:
    kind = nodes.kind_of(cluster)
    async with Work(cluster.url, **SETTINGS[kind]) as work:
        name = work.queue.name
        await eventually(lambda: nodes.whole(cluster, name), "all nodes have all there is")
        victim = await nodes.leader(cluster, name)
        assert victim is not None
        await elsewhere(victim.pause)
        try:
            begun, known = time.monotonic(), work.sent
            await until(
                lambda: any(n > known + 100 for n in work.confirmed & work.handled.keys()), "messages flow again"
            )
            # `pytest -rP` shows it: what docs/clusters.md says was measured with this.
            sys.stdout.write(f"{kind}: messages flow {time.monotonic() - begun:.1f} s after the node hung\n")
            assert await nodes.leader(cluster, name) is not victim
        finally:
            await elsewhere(victim.unpause)
        # It thinks that it still leads; nobody is to believe it. RabbitMQ 3.10 does not take a node back that was stopped for so long.
        if kind == "rabbitmq":
            await elsewhere(victim.restart)
        await nodes.eventually(lambda: nodes.whole(cluster, name), SOON, "it has all there is again")
        await work.flows()
