"""Faults that only RabbitMQ knows: its alarms, by which it takes no messages from publishers."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from unibus_contracts.chaos.stage import Fault, NoBite, Stage
from unibus_contracts.supply.rabbitmq import RabbitMQ

_TOLD = 60.0  # seconds that its tool may take, on a busy machine
_BLOCKED = 20.0  # seconds until a publisher has run into it
_STATE = (
    "{rabbit_alarm:get_alarms(), [State || Connection <- rabbit_networking:connections(), "
    "{state, State} <- rabbit_networking:connection_info(Connection, [state])]}."
)


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


def _alarm(source: str, getter: str, setter: str, worse: str) -> Fault:
    """`source`: by which the server names the alarm; the rest are functions of it, and a value that sets it off."""

    @asynccontextmanager
    async def fault(stage: Stage) -> AsyncIterator[None]:
        # One call where one does: the tool is a virtual machine that has to start, and takes seconds on a busy machine.
        before = await ctl(stage, "eval", f"Before = {getter}(), {setter}({worse}), Before.")
        said, blocked = "", 0
        try:
            yield
            async with asyncio.timeout(_BLOCKED):
                while not blocked:
                    said = await ctl(stage, "eval", _STATE)
                    blocked = len(re.findall(r"\bblocked\b", said))
        except TimeoutError:
            raise NoBite(f"no connection was blocked: {said.strip()}") from None
        finally:
            await ctl(stage, "eval", f"{setter}({before.strip()}).")
        if f"resource_limit,{source}," not in said:
            raise NoBite(f"there was no {source} alarm: {said.strip()}")
        stage.proof = f"{blocked} connections were blocked by the {source} alarm"

    return fault


memory_alarm = _alarm(
    "memory",
    "vm_memory_monitor:get_vm_memory_high_watermark",
    "vm_memory_monitor:set_vm_memory_high_watermark",
    '{absolute, "1MB"}',
)
disk_alarm = _alarm(
    "disk",
    "rabbit_disk_monitor:get_disk_free_limit",
    "rabbit_disk_monitor:set_disk_free_limit",
    "1000000000000000",
)

FAULTS: Mapping[str, Fault] = {
    "rabbitmq-memory-alarm": memory_alarm,
    "rabbitmq-disk-alarm": disk_alarm,
}
