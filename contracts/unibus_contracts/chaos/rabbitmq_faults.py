"""Faults that only RabbitMQ knows: its alarms, by which it takes no messages from publishers."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
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
    "{state, State} <- rabbit_networking:connection_info(Connection, [state])]}"
)


async def evaluate(stage: Stage, expression: str) -> str:
    """What the server makes of an Erlang expression. Raises NoBite where it isn't a process of this machine."""
    if not stage.broker.native or stage.broker.record is None:
        raise NoBite("the server isn't a process of this machine, so it can't be told")
    server = RabbitMQ().native(stage.broker.record.site)
    node = server.environment["RABBITMQ_NODENAME"]
    # rabbitmqctl is a virtual machine that has to start, which takes a busy machine ten seconds: long enough for the work
    # to be over. Erlang's small tool needs none, where it is installed.
    quick = shutil.which("erl_call")
    command = [quick, "-n", node, "-e"] if quick else [str(Path(server.argv[0]).with_name("rabbitmqctl")), "--quiet"]
    # The cookie, by which they are let in, is in the server's HOME.
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(stage.broker.home),
        "LC_ALL": "C.UTF-8",
        **server.environment,
    }
    done = await asyncio.to_thread(
        subprocess.run,
        command if quick else [*command, "eval", f"{expression}."],
        input=f"{expression}.\n",
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TOLD,
        check=False,
    )
    said = done.stdout.strip()
    if done.returncode or (quick and not said.startswith("{ok, ")):
        raise RuntimeError(f"{expression}: {said}{done.stderr}")
    return said.removeprefix("{ok, ").removesuffix("}") if quick else said


def _alarm(source: str, getter: str, setter: str, worse: str) -> Fault:
    """`source`: by which the server names the alarm; the rest are functions of it, and a value that sets it off."""

    @asynccontextmanager
    async def fault(stage: Stage) -> AsyncIterator[None]:
        before = await evaluate(stage, f"Before = {getter}(), {setter}({worse}), Before")
        said, blocked = "", 0
        try:
            yield
            async with asyncio.timeout(_BLOCKED):
                while True:
                    said = await evaluate(stage, _STATE)
                    if blocked := len(re.findall(r"\bblocked\b", said)):
                        break
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise NoBite(f"no connection was blocked: {said}") from None
        finally:
            await evaluate(stage, f"{setter}({before})")
        if not re.search(rf"resource_limit, *{source},", said):
            raise NoBite(f"there was no {source} alarm: {said}")
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
