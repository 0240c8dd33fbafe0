"""ElasticMQ: SQS alone, with AWS' limits enforced, which the emulator of `sqs` leaves out. It lets in everybody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

from . import maven
from .broker import LOOPBACK, Command, Site

VERSION = "1.6.9"
_NAME = f"elasticmq-{VERSION}"
_TIMEOUT = 5.0


class ElasticMQ:
    name = "elasticmq"
    process = "java"
    image = f"softwaremill/elasticmq:{VERSION}"
    ports: Sequence[str] = ("http",)
    private_ports: Sequence[str] = ()

    def install(self) -> None:
        maven.install(_NAME, f"org.elasticmq:elasticmq-server_2.13:{VERSION}")

    def files(self, site: Site) -> Mapping[str, bytes]:
        return {}

    def native(self, site: Site) -> Command:
        # Two processors and C1 code only, as for Kafka: it starts in half the time.
        java = ["java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        return Command([*java, *_options(site), "-cp", f"{maven.folder(_NAME)}/libs/*", "org.elasticmq.server.Main"])

    def container(self, site: Site) -> Command:
        return Command([], {"JAVA_TOOL_OPTIONS": " ".join(_options(site))})

    def variables(self, site: Site, files: Path) -> Mapping[str, str]:
        server = f"http://{LOOPBACK}:{site.ports['http']}"
        return {"URL": f"sqs://{site.user}:{site.password}@eu-west-1?endpoint_url={server}&wait=1"}

    def settled(self, home: Path) -> bool:
        return True  # it keeps nothing

    def check(self, url: str) -> None:
        server = parse_qs(urlsplit(url).query)["endpoint_url"][0]
        with urlopen(f"{server}/?Action=ListQueues", timeout=_TIMEOUT) as answer:  # noqa: S310 - http, as it was started
            if b"ListQueuesResponse" not in answer.read():
                raise ConnectionError(f"{server} answers, but not as SQS")


def _options(site: Site) -> list[str]:
    settings = {
        "rest-sqs.bind-hostname": site.address,
        "rest-sqs.bind-port": site.ports["http"],
        "rest-sqs.sqs-limits": "strict",
        "rest-stats.enabled": "false",
        "node-address.host": LOOPBACK,  # in the queues' URLs
        "node-address.port": site.ports["http"],
        "aws.region": "eu-west-1",
    }
    return [f"-D{name}={value}" for name, value in settings.items()]
