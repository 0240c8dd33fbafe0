"""Apache Kafka, KRaft, one node unless it is part of a cluster: SASL on one port, the same over TLS on another, and an authorizer that refuses by default."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from . import maven
from .broker import LOOPBACK, Command, Site

VERSION = "4.3.0"
_NAME = f"kafka-{VERSION}"
_CLUSTER = "dW5pYnVzLXRlc3RzLTAwMQ"  # base64 of 16 bytes; the same for all, since they never meet
_TIMEOUT = 5.0

# BEHIND is for a proxy: clients are told to come back to the proxy's port, at which the broker doesn't listen itself.
# Automatic creation of topics stays on, as it is by default: a client that looks a name up must not make a topic by it.
CONFIG = """\
process.roles=broker,controller
node.id={node}
controller.quorum.voters={voters}
controller.listener.names=CONTROLLER
listeners=SASL_PLAINTEXT://{address}:{sasl},SASL_SSL://{address}:{tls},BEHIND://{address}:{behind},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=SASL_PLAINTEXT://127.0.0.1:{sasl},SASL_SSL://127.0.0.1:{tls},BEHIND://127.0.0.1:{front}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL,BEHIND:SASL_PLAINTEXT
inter.broker.listener.name=SASL_PLAINTEXT
sasl.mechanism.inter.broker.protocol=PLAIN
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.sasl_plaintext.plain.sasl.jaas.config={plain}
listener.name.sasl_ssl.plain.sasl.jaas.config={plain}
listener.name.sasl_plaintext.scram-sha-256.sasl.jaas.config={scram}
listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config={scram}
listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config={scram}
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config={scram}
listener.name.behind.scram-sha-256.sasl.jaas.config={scram}
listener.name.behind.scram-sha-512.sasl.jaas.config={scram}
listener.name.behind.plain.sasl.jaas.config={plain}
ssl.keystore.type=PEM
ssl.keystore.location={folder}/server.pem
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:{user};User:ANONYMOUS
log.dirs={data}
default.replication.factor={replicas}
min.insync.replicas={in_sync}
offsets.topic.num.partitions=4
offsets.topic.replication.factor={replicas}
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr={in_sync}
share.coordinator.state.topic.replication.factor={replicas}
share.coordinator.state.topic.min.isr={in_sync}
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
"""


class Kafka:
    name = "kafka"
    process = "java"
    image = f"apache/kafka:{VERSION}"
    ports: Sequence[str] = ("sasl", "tls", "behind")
    private_ports: Sequence[str] = ("controller", "front")
    heap = "512m"

    def install(self) -> None:
        maven.install(_NAME, f"org.apache.kafka:kafka_2.13:{VERSION}", f"org.apache.kafka:kafka-tools:{VERSION}")

    def files(self, site: Site, among: Sequence[Site] = ()) -> Mapping[str, bytes]:
        """`among`: all nodes of its cluster."""
        import trustme  # heavy, and only a first start needs it
        from cryptography.hazmat.primitives import serialization

        authority = trustme.CA()
        server = authority.issue_cert("localhost", LOOPBACK)
        key = serialization.load_pem_private_key(server.private_key_pem.bytes(), None)
        pkcs8 = key.private_bytes(  # the only form of a key that Kafka reads
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        # A user without any right: what it may do is for each test to grant.
        plain = (
            f'org.apache.kafka.common.security.plain.PlainLoginModule required username="{site.user}" '
            f'password="{site.password}" user_{site.user}="{site.password}" user_{_limited(site)}="{site.password}";'
        )
        nodes = among or [site]
        ports = {"controller": 9093, "front": 9094, **site.ports}
        config = CONFIG.format(
            **ports,
            node=nodes.index(site) + 1,
            voters=",".join(
                f"{n}@{LOOPBACK}:{other.ports.get('controller', 9093)}" for n, other in enumerate(nodes, 1)
            ),
            replicas=len(nodes),
            in_sync=len(nodes) // 2 + 1,
            address=site.address,
            folder=site.folder,
            data=f"{site.folder}/data" if site.address == LOOPBACK else "/tmp/data",  # noqa: S108  # in a container
            user=site.user,
            plain=plain,
            scram="org.apache.kafka.common.security.scram.ScramLoginModule required;",
        )
        return {
            "server.properties": config.encode(),
            "server.pem": pkcs8 + b"".join(pem.bytes() for pem in server.cert_chain_pems),
            "ca.pem": authority.cert_pem.bytes(),
        }

    def native(self, site: Site) -> Command:
        # Two processors and C1 code only: it starts in half the time, and tests share the machine.
        java = (
            f"java -Xms128m -Xmx{self.heap} -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -cp '{maven.folder(_NAME)}/libs/*'"
        )
        run = f"exec {java} kafka.Kafka {site.folder}/server.properties"
        return Command(["/bin/sh", "-c", f"{_format(site, java + ' kafka.tools.StorageTool')} && {run}"])

    def container(self, site: Site) -> Command:
        scripts = "/opt/kafka/bin"
        run = f"exec {scripts}/kafka-server-start.sh {site.folder}/server.properties"
        return Command(["/bin/sh", "-c", f"{_format(site, scripts + '/kafka-storage.sh')} && {run}"])

    def variables(self, site: Site, files: Path) -> Mapping[str, str]:
        account = f"{site.user}:{site.password}@{LOOPBACK}"
        limited = f"{_limited(site)}:{site.password}@{LOOPBACK}"
        return {
            "URL": f"kafka://{account}:{site.ports['sasl']}",
            "TLS_URL": f"kafkas://{account}:{site.ports['tls']}",
            "LIMITED_URL": f"kafka://{limited}:{site.ports['sasl']}",
            "CA": str(files / "ca.pem"),
            "PROXY": f"{site.ports.get('front', 0)}:{site.ports['behind']}",
        }

    def settled(self, home: Path) -> bool:
        return True  # what was confirmed is in the page cache, which a SIGKILL leaves alone

    def check(self, url: str) -> None:
        parts = urlsplit(url)
        for host in parts.netloc.rpartition("@")[2].split(","):
            place = urlsplit(f"//{host}")
            with socket.create_connection((place.hostname or "localhost", place.port or 9092), _TIMEOUT) as link:
                if parts.scheme == "kafkas":
                    context = ssl.create_default_context()
                    context.check_hostname = False
                    context.verify_mode = ssl.CERT_NONE  # whether it is trusted is for the tests to find out
                    with context.wrap_socket(link) as sealed:
                        _greet(sealed, host)
                else:
                    _greet(link, host)


def _limited(site: Site) -> str:
    return f"{site.user}limited"


def _format(site: Site, tool: str) -> str:
    """The storage, unless it is there; with the same account for SCRAM as for PLAIN."""
    scram = " ".join(
        f"--add-scram '{mechanism}=[name={user},password={site.password}]'"
        for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
        for user in (site.user, _limited(site))
    )
    return f"{tool} format -t {_CLUSTER} -c {site.folder}/server.properties --ignore-formatted {scram} >/dev/null"


def _greet(link: socket.socket, host: str) -> None:
    """Ask which versions of its protocol it speaks: ApiVersions (18), version 0, which needs no login."""
    request = struct.pack(">hhih", 18, 0, 1, -1)
    link.sendall(struct.pack(">i", len(request)) + request)
    answer = b""
    while len(answer) < 8 and (part := link.recv(8 - len(answer))):
        answer += part
    if len(answer) < 8 or struct.unpack(">ii", answer)[1] != 1:
        raise ConnectionError(f"{host} answers, but not as a Kafka broker")
