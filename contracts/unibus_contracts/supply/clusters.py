"""How three brokers become one: what stands in their files beyond that of a single one, and in which order they start.

Each member is a broker like any other, with a folder and a process of its own, so that one of them can be killed, paused and
restarted. RabbitMQ: three nodes, of which the second and third join the first. Kafka: three nodes that are broker and
controller, replication 3 and min.insync.replicas 2. Redis: a primary, two replicas, and three Sentinels beside them.
"""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.request import Request, urlopen

from .broker import LOOPBACK, Command, Kind, Site
from .kafka import Kafka
from .rabbitmq import RabbitMQ
from .redis import Redis, ask

MASTER = "main"  # by which the Sentinels know the primary
_TIMEOUT = 5.0


@dataclass(frozen=True)
class Member:
    role: str  # the last part of its name
    kind: Kind
    later: bool = False  # started once the others are one


class Assembly(Protocol):
    """One kind of cluster."""

    name: str  # of the kind of broker
    members: Sequence[Member]
    shared: Sequence[str]  # ports that are the same for all

    def files(self, sites: Sequence[Site], at: int) -> Mapping[str, bytes]:
        """Of the member at this place, as `Kind.files`."""

    def url(self, sites: Sequence[Site]) -> str:
        """With all hosts."""

    def formed(self, sites: Sequence[Site]) -> bool:
        """Whether these, which all answer, are one cluster by now. Raises OSError while nobody can say."""


class RabbitMQNodes:
    name = "rabbitmq"
    members: Sequence[Member] = tuple(Member(str(n), RabbitMQ(), later=n > 1) for n in (1, 2, 3))
    shared: Sequence[str] = ("epmd",)  # where Erlang's nodes find each other

    def files(self, sites: Sequence[Site], at: int) -> Mapping[str, bytes]:
        own = sites[at]
        # pause_minority: a node that is cut off stops, and comes back by itself. The default lets it go on alone, and its
        # half of the metadata stays apart for ever. A node that is silent is noticed after 20 s instead of a minute.
        config = ["cluster_partition_handling = pause_minority", "net_ticktime = 20"]
        if at:
            config += [
                "cluster_formation.peer_discovery_backend = classic_config",
                *(
                    f"cluster_formation.classic_config.nodes.{n} = {site.node}@localhost"
                    for n, site in enumerate((sites[0], own), 1)
                ),
            ]
        files = dict(RabbitMQ().files(own))
        files["rabbitmq.conf"] += "".join(f"{line}\n" for line in config).encode()
        files[".erlang.cookie"] = sites[0].password.encode()
        return files

    def url(self, sites: Sequence[Site]) -> str:
        return f"amqp://{sites[0].user}:{sites[0].password}@{_hosts(sites, 'amqp')}/"

    def formed(self, sites: Sequence[Site]) -> bool:
        account = base64.b64encode(f"{sites[0].user}:{sites[0].password}".encode()).decode()
        for site in sites:
            request = Request(
                f"http://{LOOPBACK}:{site.ports['api']}/api/nodes", headers={"Authorization": f"Basic {account}"}
            )
            with urlopen(request, timeout=_TIMEOUT) as answer:  # noqa: S310  # http, of our own making
                if [node.get("running") for node in json.load(answer)] != [True] * len(sites):
                    return False
        return True


class _KafkaNode(Kafka):
    """By a name of its own, so that nobody takes it for a broker. With half the heap one ran out of it under the contract suite."""

    name = "kafkanode"


class KafkaNodes:
    name = "kafka"
    members: Sequence[Member] = tuple(Member(str(n), _KafkaNode()) for n in (1, 2, 3))
    shared: Sequence[str] = ()

    def files(self, sites: Sequence[Site], at: int) -> Mapping[str, bytes]:
        return Kafka().files(sites[at], among=sites)

    def url(self, sites: Sequence[Site]) -> str:
        return f"kafka://{sites[0].user}:{sites[0].password}@{_hosts(sites, 'sasl')}"

    def formed(self, sites: Sequence[Site]) -> bool:
        return True  # none answers before the controllers have taken it in


class Sentinel(Redis):
    """It watches the others, and says who is the primary."""

    name = "sentinel"
    ports: Sequence[str] = ("sentinel",)

    def native(self, site: Site) -> Command:
        return Command(["redis-server", f"{site.folder}/sentinel.conf", "--sentinel"])

    def variables(self, site: Site, files: Path) -> Mapping[str, str]:
        return {"URL": f"redis://{LOOPBACK}:{site.ports['sentinel']}"}


# A primary is taken for dead after 5 s without an answer: on a busy machine 2 s came to pass by themselves. failover-timeout: after twice that another failover may begin.
SENTINEL = """\
bind {address}
port {port}
dir {folder}
set-proc-title no
sentinel monitor {master} {address} {primary} 2
sentinel auth-user {master} {user}
sentinel auth-pass {master} {password}
sentinel down-after-milliseconds {master} 5000
sentinel failover-timeout {master} 5000
sentinel parallel-syncs {master} 2
"""


class RedisNodes:
    name = "redis"
    members: Sequence[Member] = (
        *(Member(str(n), Redis()) for n in (1, 2, 3)),
        *(Member(f"sentinel{n}", Sentinel(), later=True) for n in (1, 2, 3)),
    )
    shared: Sequence[str] = ()

    def files(self, sites: Sequence[Site], at: int) -> Mapping[str, bytes]:
        own, primary = sites[at], sites[0]
        values = {
            "master": MASTER,
            "primary": primary.ports["redis"],
            "user": primary.user,
            "password": primary.password,
        }
        if at >= 3:
            config = SENTINEL.format(address=own.address, port=own.ports["sentinel"], folder=own.folder, **values)
            return {"sentinel.conf": config.encode()}
        # Every one of them may come to be a replica.
        more = "masteruser {user}\nmasterauth {password}\nrepl-diskless-sync-delay 0\n"
        if at:
            more += f"replicaof {LOOPBACK} {{primary}}\n"
        files = dict(Redis().files(own))
        files["redis.conf"] += more.format(**values).encode()
        return files

    def url(self, sites: Sequence[Site]) -> str:
        account = f"{sites[0].user}:{sites[0].password}"
        return f"redis://{account}@{_hosts(sites[3:], 'sentinel')}/0?sentinel={MASTER}"

    def formed(self, sites: Sequence[Site]) -> bool:
        primary = sites[0]
        with socket.create_connection((LOOPBACK, primary.ports["redis"]), _TIMEOUT) as link:
            ask(link, "AUTH", primary.user, primary.password)
            if ask(link, "WAIT", "2", "1000") != b":2\r\n":  # the replicas that have all there is
                return False
        for site in sites[3:]:
            with socket.create_connection((LOOPBACK, site.ports["sentinel"]), _TIMEOUT) as link:
                known = ask(link, "SENTINEL", "MASTER", MASTER, until=b"parallel-syncs\r\n$1\r\n2\r\n").split(b"\r\n")
                # Name and value have their lengths before them.
                if any(known[known.index(name) + 2] != b"2" for name in (b"num-slaves", b"num-other-sentinels")):
                    return False
        return True


ASSEMBLIES: dict[str, Assembly] = {made.name: made for made in (RabbitMQNodes(), KafkaNodes(), RedisNodes())}


def _hosts(sites: Sequence[Site], port: str) -> str:
    return ",".join(f"{LOOPBACK}:{site.ports[port]}" for site in sites)
