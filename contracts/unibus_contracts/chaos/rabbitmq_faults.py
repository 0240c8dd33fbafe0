"""Faults that only RabbitMQ knows: its alarms, by which it takes no messages from publishers."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from unibus_contracts.chaos.stage import Fault, NoBite, Stage
from unibus_contracts.supply.rabbitmq import RabbitMQ

_TOLD = 60.0  # seconds that its tool may take, on a busy machine
_BLOCKED = 20.0  # seconds until a publisher has run into it


async def ctl(stage: Stage, *words: str) -> str:
    """What `rabbitmqctl` prints. Raises NoBite where the server isn't a process of this machine."""
    if not stage.broker.native or stage.broker.record is None:
        raise NoBite("the server isn't a process of this machine, so rabbitmqctl doesn't reach it")
    server = RabbitMQ().native(stage.broker.record.site)
    # The cookie, by which the tool is let in, is in the server's HOME.
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(stage.broker.home),
        "LC_ALL": "C.UTF-8",
        **server.environment,
    }
    done = await asyncio.to_thread(
        subprocess.run,
        [str(Path(server.argv[0]).with_name("rabbitmqctl")), "--quiet", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TOLD,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"rabbitmqctl {words[0]}: {done.stdout}{done.stderr}")
    return done.stdout


def _alarm(source: str, ask: str, worse: tuple[str, ...], command: str) -> Fault:
    """`source`: by which the server names the alarm; `ask` is for the setting in force, `command` sets it."""

    @asynccontextmanager
    async def fault(stage: Stage) -> AsyncIterator[None]:
        before = (await ctl(stage, "eval", ask)).strip()
        blocked = 0
        try:
            await ctl(stage, command, *worse)
            yield
            async with asyncio.timeout(_BLOCKED):
                while not blocked:
                    states = await ctl(stage, "list_connections", "state")
                    blocked = sum(state == "blocked" for state in states.split())
        except TimeoutError:
            raise NoBite("no connection was blocked") from None
        finally:
            alarms = await ctl(stage, "eval", "rabbit_alarm:get_alarms().")
            await ctl(stage, command, before)
        if source not in alarms:
            raise NoBite(f"no alarm for {source}: {alarms.strip()}")
        stage.proof = f"{blocked} connections were blocked by the {source} alarm"

    return fault


memory_alarm = _alarm(
    "memory",
    "vm_memory_monitor:get_vm_memory_high_watermark().",
    ("absolute", "1MB"),
    "set_vm_memory_high_watermark",
)
disk_alarm = _alarm("disk", "rabbit_disk_monitor:get_disk_free_limit().", ("1000TB",), "set_disk_free_limit")

FAULTS: Mapping[str, Fault] = {
    "rabbitmq-memory-alarm": memory_alarm,
    "rabbitmq-disk-alarm": disk_alarm,
}
