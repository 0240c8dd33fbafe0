"""The brokers' own tools as contestants: processes that measure themselves, so there is no CPU time of theirs.

RabbitMQ has none in Debian; `rabbitmq_socket` stands in for it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import children
from benchmarks.cases import TOOL
from benchmarks.flows import Contestant, Flow, Raw
from benchmarks.load import Miscount
from benchmarks.watch import Watch

_LOCAL = {"127.0.0.1", "::1", "localhost"}
_PIPELINED = 100  # commands a write


class _Tool(Raw):
    name = TOOL
    untried = True


class KafkaTools(_Tool):
    """ProducerPerformance and ConsumerPerformance. The consumer commits nothing but its end, and looks at no record."""

    leaves = True

    def __init__(self, options: dict[str, Any], jars: Path) -> None:
        self._options = options
        self._java = ["java", "-Xmx512m", "-cp", f"{jars}/*"]

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        with self._config("acks=all", "enable.idempotence=true", "batch.size=131072") as config:
            found = await self._run(
                *("ProducerPerformance", "--topic", queue, "--command-config", config, "--throughput", "-1"),
                *("--num-records", str(messages), "--record-size", str(len(flow.body))),
            )
        watch.told(messages / float(_found(r"([\d.]+) records/sec", found)))

    async def consume(self, queue: str, messages: int, flow: Flow, watch: Watch) -> int:
        with self._config() as config:
            found = await self._run(
                *(
                    "ConsumerPerformance",
                    "--topic",
                    queue,
                    "--command-config",
                    config,
                    "--hide-header",
                    "--timeout",
                    "60000",
                ),
                *("--num-records", str(messages), "--group", queue),
            )
        return consumed(found, watch)

    async def _run(self, tool: str, *arguments: str) -> str:
        servers = ",".join(self._options["bootstrap_servers"])
        name = f"org.apache.kafka.tools.{tool}"
        return await children.output(TOOL, [*self._java, name, "--bootstrap-server", servers, *arguments])

    @contextmanager
    def _config(self, *lines: str) -> Iterator[str]:
        """A file that nobody else can read: there is a password in it."""
        own = self._options
        if "sasl_mechanism" in own:
            login = f'username="{own["sasl_plain_username"]}" password="{own["sasl_plain_password"]}"'
            lines += (
                f"security.protocol={own['security_protocol']}",
                f"sasl.mechanism={own['sasl_mechanism']}",
                f"sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required {login};",
            )
        with tempfile.NamedTemporaryFile("w", suffix=".properties") as file:
            file.write("\n".join(lines))
            file.flush()
            yield file.name


def consumed(line: str, watch: Watch) -> int:
    """Of the last line of ConsumerPerformance: how many, and to the watch how long without joining the group."""
    cells = [cell.strip() for cell in line.strip().splitlines()[-1].split(",")]
    watch.told(max(float(cells[7]), 1.0) / 1000)  # fetch.time.ms
    return int(cells[4])


class RedisBenchmark(_Tool):
    """redis-benchmark: it adds the same entry again and again, and does not read."""

    only_sends = True

    def __init__(self, url: str) -> None:
        self._url = url

    async def send(self, queue: str, messages: int, flow: Flow, watch: Watch) -> None:
        own = '{"x-message-id":"0123456789abcdef-0000","x-content-type":"application/octet-stream"}'
        found = await children.output(
            TOOL,
            [
                *("redis-benchmark", "-u", self._url, "-c", "1", "-P", str(_PIPELINED), "-n", str(messages), "--csv"),
                *("XADD", queue, "*", "body", flow.body.decode(), "headers", own),
            ],
        )
        watch.told(messages / float(_found(r'"XADD.*?","([\d.]+)","', found)))


def of(kind: str, url: str) -> list[Contestant]:
    """None where it isn't installed, or can't be told how to connect."""
    if kind == "kafka" and url.startswith("kafka:") and shutil.which("java"):
        from benchmarks.kafka import options
        from unibus_contracts.supply import kafka, maven

        jars = maven.folder(f"kafka-{kafka.VERSION}") / "libs"  # there once the supply has fetched them
        return [KafkaTools(options(url), jars)] if jars.exists() else []
    # The command line of redis-benchmark has the URL in it, so only where both are on this machine.
    if kind == "redis" and url.startswith("redis:") and urlsplit(url).hostname in _LOCAL:
        return [RedisBenchmark(url)] if shutil.which("redis-benchmark") else []
    return []


def _found(pattern: str, text: str) -> str:
    found = re.findall(pattern, text)
    if not found:
        raise Miscount(f"{TOOL} said nothing that looks like a rate: {text[-500:]!r}")
    return str(found[-1])
