"""New interpreters: for what has to begin from nothing, or shall not inherit what others have left in memory."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.load import Miscount

ROOT = Path(__file__).parent.parent


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, without what would configure a bus, and with leave to keep compiled code, as an installed package has it."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("UNIBUS_")}
    ours.pop("PYTHONDONTWRITEBYTECODE", None)
    return ours | dict(more or {})


async def ask(module: str, question: Mapping[str, Any], longest: float, *arguments: str) -> Any:
    """What the module answers, both as JSON: the question on stdin, since there may be a password in it. Raises Miscount."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        async with asyncio.timeout(longest):
            return json.loads(await output(module, command, json.dumps(question).encode()))
    except TimeoutError as late:
        raise Miscount(f"{module} has no answer after {longest:.0f} s") from late


async def output(name: str, command: Sequence[str], given: bytes = b"") -> str:
    """What a program writes to stdout. It is killed when we are cancelled. Raises Miscount where it fails."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=environment(),
    )
    try:
        out, error = await process.communicate(given)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise Miscount(f"{name} ended with {process.returncode}: {error.decode()[-1000:]}")
    return out.decode()
