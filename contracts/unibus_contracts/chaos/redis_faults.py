"""Faults that only Redis knows: paused clients, no memory, no disk, no replicas, a master that is one no more."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unibus_contracts.chaos.stage import Fault, NoBite, Stage, bit

if TYPE_CHECKING:
    from redis.asyncio import Redis

_PROBE = "unibus-chaos-probe"
_WRITTEN = 30.0  # seconds until the server has written down what it had to keep in mind
_ROOM = 24 << 20  # bytes of the small disk beyond what is on it; memory, really


def _client(stage: Stage) -> Redis:
    """To the server itself, not through the proxy."""
    from redis.asyncio import Redis  # only for who has that broker

    return Redis.from_url(stage.broker.url)


def _refusing(code: str, worse: Mapping[str, str], better: Mapping[str, str], what: str) -> Fault:
    """A setting by which the server refuses writes with an error of this code."""

    @asynccontextmanager
    async def fault(stage: Stage) -> AsyncIterator[None]:
        async with _client(stage) as client, _refused(stage, client, code, what):
            for name, value in worse.items():
                await client.config_set(name, value)
            try:
                yield
            finally:
                for name, value in better.items():
                    await client.config_set(name, value)

    return fault


@asynccontextmanager
async def _refused(stage: Stage, client: Redis, code: str, what: str) -> AsyncIterator[None]:
    """The server itself counts its error replies."""
    before = await _errors(client, code)
    yield
    bit(stage, await _errors(client, code) - before, f"commands were refused with {code}: {what}")


async def _errors(client: Redis, code: str) -> int:
    found: dict[str, Any] = await client.info("errorstats")
    return int(found.get(f"errorstat_{code}", {}).get("count", 0))


memory_full = _refusing("OOM", {"maxmemory": "1"}, {"maxmemory": "0"}, "its maxmemory is reached")
replicas_missing = _refusing(
    "NOREPLICAS", {"min-replicas-to-write": "1"}, {"min-replicas-to-write": "0"}, "it has no replica"
)


@asynccontextmanager
async def demoted(stage: Stage) -> AsyncIterator[None]:
    """The server becomes the replica of one that isn't there, and later a master again, with all it had."""
    async with _client(stage) as client, _refused(stage, client, "READONLY", "it was a replica"):
        await client.replicaof("127.0.0.1", 1)
        try:
            yield
        finally:
            await client.replicaof("NO", "ONE")


def _paused(everything: bool) -> Fault:
    @asynccontextmanager
    async def fault(stage: Stage) -> AsyncIterator[None]:
        async with _client(stage) as client, _client(stage) as prober:
            await prober.ping()  # connected before: a login would wait as well
            await client.client_pause(round(stage.pause * 1000), all=everything)
            began = asyncio.get_running_loop().time()
            # Nothing else shows that commands wait: so one of ours does, too.
            probing: asyncio.Future[Any] = asyncio.ensure_future(
                prober.ping() if everything else prober.set(_PROBE, "", ex=60)
            )
            yield
            await probing
            waited = asyncio.get_running_loop().time() - began
        if waited < 0.9 * stage.pause:
            raise NoBite(f"a {'ping' if everything else 'write'} was answered after {waited:.2f} s")
        stage.proof = f"a {'ping' if everything else 'write'} was answered after {waited:.1f} s"

    return fault


paused = _paused(everything=True)
writes_paused = _paused(everything=False)


def cannot_mount() -> str:
    """Why a small disk can't be made on this machine; empty where it can."""
    if shutil.which("mount") is None:
        return "there is no mount on this machine"
    if os.geteuid():
        return "only root can mount a small disk"
    effective = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    return "" if int(effective.split()[1], 16) >> 21 & 1 else "this root may not mount (CAP_SYS_ADMIN)"


@asynccontextmanager
async def disk_full(stage: Stage) -> AsyncIterator[None]:
    """The disk below the append-only file is full, and later has room again.

    The server is killed before and afterwards, to move its files to a small disk and back.
    """
    folder = stage.broker.home / "appendonlydir"
    if not stage.broker.native or not folder.is_dir():
        raise NoBite("the server isn't a process of this machine with an append-only file")
    async with (
        _small_disk(stage, folder),
        _client(stage) as client,
        _refused(stage, client, "MISCONF", "its disk is full"),
    ):
        filler = folder / "filler"
        _fill(filler)
        try:
            yield
        finally:
            filler.unlink()
            # What it has answered is in its memory alone until it could write it down.
            async with asyncio.timeout(_WRITTEN):
                while (await client.info("persistence"))["aof_last_write_status"] != "ok":  # noqa: ASYNC110  # no event
                    await asyncio.sleep(0.05)


@asynccontextmanager
async def _small_disk(stage: Stage, folder: Path) -> AsyncIterator[None]:
    """Mounted on `folder`, with what was there; the server runs on it."""
    broker = stage.broker
    with tempfile.TemporaryDirectory() as kept:
        await asyncio.to_thread(broker.kill)
        try:
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            await _run("mount", "-t", "tmpfs", "-o", f"size={_size(folder) + _ROOM}", "tmpfs", str(folder))
            try:
                shutil.copytree(kept, folder, dirs_exist_ok=True)
                await asyncio.to_thread(broker.restart)
                yield
            finally:
                await asyncio.to_thread(broker.kill)
                shutil.rmtree(kept)
                shutil.copytree(folder, kept)
                await _run("umount", str(folder))
            shutil.rmtree(folder)
            shutil.copytree(kept, folder)
        finally:
            await asyncio.to_thread(broker.restart)


def _size(folder: Path) -> int:
    """Bytes of all that is there: after hundreds of thousands of messages the file is larger than any room that we would add."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 65536) == 65536:
                pass
        except OSError:  # full: that is what was wanted
            return


async def _run(*command: str) -> None:
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)


FAULTS: Mapping[str, Fault] = {
    "redis-paused": paused,
    "redis-writes-paused": writes_paused,
    "redis-memory-full": memory_full,
    "redis-disk-full": disk_full,
    "redis-replicas-missing": replicas_missing,
    "redis-demoted": demoted,
}
