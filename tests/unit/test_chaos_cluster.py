"""The faults of clusters: what they wait for and what they prove, on nodes that only say what they are told; and the command."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from unibus_contracts.chaos import cluster_faults, nodes
from unibus_contracts.chaos.__main__ import main
from unibus_contracts.chaos.cluster_faults import FAULTS
from unibus_contracts.chaos.faults import NOT_DRAWN, not_tried, possible, schedule
from unibus_contracts.chaos.stage import NoBite, Stage
from unibus_contracts.history import Expected


class Node:
    def __init__(self, of: Nodes, number: int) -> None:
        self.of, self.name, self.pid, self.well = of, f"node-{number}", 100 + number, True
        self.done: list[str] = []

    def kill(self) -> None:
        self.done.append("kill")
        self.well = False
        self.of.elect()

    def restart(self) -> None:
        self.done.append("restart")
        self.well = True
        if "kill" in self.done:
            self.pid += 100
        else:
            self.of.elect(but=self)

    def pause(self) -> None:
        self.done.append("pause")
        self.well = False
        self.of.elect()

    def unpause(self) -> None:
        self.done.append("unpause")
        self.well = True


class Nodes:
    """Three of a kind. `elects`: another one takes over."""

    def __init__(self, *, elects: bool = True) -> None:
        self.name, self.url, self.elects = "kafka-cluster-x", "kafka://u:p@h1,h2,h3", elects
        self.nodes = tuple(Node(self, number) for number in (1, 2, 3))
        self.leads: Node | None = self.nodes[1]

    def elect(self, but: Node | None = None) -> None:
        if self.elects and (self.leads is but or not (self.leads and self.leads.well)):
            self.leads = next((node for node in self.nodes if node.well and node is not but), None)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    async def leader(cluster: Nodes, name: str) -> Node | None:
        assert name == "chaos-1-work"
        if cluster.leads is None:
            raise ConnectionRefusedError("nobody answers")
        return cluster.leads

    async def whole(cluster: Nodes, name: str) -> bool:
        return all(node.well for node in cluster.nodes)

    for module in (nodes, cluster_faults):
        monkeypatch.setattr(module, "leader", leader)
        monkeypatch.setattr(module, "whole", whole)
    monkeypatch.setattr(cluster_faults, "ELECTED", 0.2)
    return Nodes()


def stage(cluster: Nodes) -> Stage:
    consumers: list[Any] = [SimpleNamespace(prefix="chaos-1-")]
    broker: Any = cluster.nodes[0]
    proxy: Any = None
    at: Any = cluster
    return Stage(broker, proxy, consumers, random.Random(1), 0.02, at)  # noqa: S311  # not secret


@pytest.mark.parametrize(
    ("name", "done", "what"),
    [
        ("leader-killed", ["kill", "restart"], "was killed"),
        ("leader-hangs", ["pause", "unpause"], "was stopped"),
        ("leader-restarted", ["restart"], "was restarted"),
    ],
)
async def test_who_leads_is_struck_and_heals_when_another_has_taken_over(
    cluster: Nodes, name: str, done: list[str], what: str
) -> None:
    at, victim = stage(cluster), cluster.nodes[1]
    async with FAULTS["kafka"][name](at):
        assert cluster.leads is cluster.nodes[0]
    assert victim.done == done
    assert at.proof.startswith(f"node-2, which led, {what}; node-1 took over after ")


@pytest.mark.parametrize("name", ["leader-killed", "leader-hangs", "leader-restarted"])
async def test_what_nobody_took_over_did_not_bite_and_heals_all_the_same(cluster: Nodes, name: str) -> None:
    cluster.elects = False
    with pytest.raises(NoBite, match="another node leads chaos-1-work"):
        async with FAULTS["kafka"][name](stage(cluster)):
            pytest.fail("it held")
    assert cluster.nodes[1].well


async def test_a_majority_that_is_killed_has_other_processes_afterwards(cluster: Nodes) -> None:
    at = stage(cluster)
    async with FAULTS["kafka"]["majority-killed"](at):
        assert [node.well for node in cluster.nodes] == [False, False, True]
    assert at.proof == "node-2, which led, and node-1 were killed and started again"
    cluster.nodes[2].restart = lambda: None  # type: ignore[method-assign]  # it was never gone
    cluster.nodes[2].kill = lambda: None  # type: ignore[method-assign]
    cluster.leads = cluster.nodes[2]
    with pytest.raises(NoBite, match="the processes are"):
        async with FAULTS["kafka"]["majority-killed"](stage(cluster)):
            pass


async def test_a_fault_waits_for_all_nodes_and_says_what_kept_it(
    cluster: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_faults, "_WHOLE", 0.0)
    cluster.nodes[2].well = False
    with pytest.raises(NoBite, match="not within 0 s: the cluster is whole"):
        async with FAULTS["kafka"]["leader-killed"](stage(cluster)):
            pytest.fail("it held")
    cluster.nodes[2].well, cluster.leads = True, None
    with pytest.raises(NoBite, match=r"has a leader \(ConnectionRefusedError: nobody answers\)"):
        async with FAULTS["kafka"]["leader-killed"](stage(cluster)):
            pytest.fail("it held")


@pytest.mark.parametrize("kind", sorted(FAULTS))
def test_the_schedule_of_a_cluster_has_its_faults_and_those_of_consumers(kind: str) -> None:
    names = possible(kind, cluster=True)
    assert {"leader-killed", "consumer-killed", "rolling-restart"} <= set(names)
    assert not {"cut", "broker-killed"} & set(names)
    drawn = set(names) - set(NOT_DRAWN.get(kind, {}))
    assert set(schedule(kind, 7, len(drawn), cluster=True)) == drawn
    assert not set(not_tried(kind, cluster=True)) & set(names)


def test_on_redis_a_settlement_may_be_lost_with_its_primary() -> None:
    """Replication is asynchronous, and only sends wait for a replica."""
    of: Any = SimpleNamespace(name="redis-cluster-chaos", url="redis://h?sentinel=main")
    assert nodes.url_of(of) == "redis://h?sentinel=main&wait_replicas=1"
    assert not nodes.promised(of, Expected()).settle_confirmed
    other: Any = SimpleNamespace(name="kafka-cluster", url="kafka://h")
    assert (nodes.url_of(other), nodes.promised(other, Expected())) == ("kafka://h", Expected())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sqs", "--cluster"], "no cluster of sqs; there are: rabbitmq, kafka, redis"),
        (["kafka", "--cluster", "--only", "cut"], "cut can't be made on kafka with --cluster"),
        (["redis", "--cluster", "--only", "majority-killed"], "Redis itself loses that"),
        (["kafka", "--only", "leader-killed"], "of another kind of broker, or of a cluster"),
    ],
)
def test_what_cannot_be_made_on_a_cluster_is_said_before_anything_is_started(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert said in capsys.readouterr().err
