"""The processes of a run: started, killed, started again, ended in an orderly way."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from unibus_contracts.chaos.worker import URL

_END = 60.0  # seconds a consumer has to drain; its own limit is 30


class Worker:
    """One producer or consumer. Started again it has another name, as its history needs, and its log goes on."""

    def __init__(self, role: str, folder: Path, name: str, prefix: str, url: str) -> None:
        self._role, self.folder, self._base, self.prefix, self._url = role, folder, name, prefix, url
        self._starts = 0
        self._process: asyncio.subprocess.Process | None = None

    @property
    def name(self) -> str:
        return f"{self._base}.{self._starts}"

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None, f"{self._base} was never started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def another(self, name: str, setting: str = "") -> Worker:
        """One more of the same, not started. `setting`: one more for its URL, as `lease=4`."""
        url = self._url + (f"{'&' if '?' in self._url else '?'}{setting}" if setting else "")
        return Worker(self._role, self.folder, name, self.prefix, url)

    async def start(self) -> None:
        """Returns once it is connected: a service that can't reach its broker at start ends, and its fault is another's."""
        self._starts += 1
        with (self.folder / f"{self._base}.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "unibus_contracts.chaos.worker"),
                *(self._role, str(self.folder), self.name, self.prefix),
                env={**os.environ, URL: self._url},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        await self._says(b"ready\n")

    async def send(self, messages: int, seconds: float) -> None:
        """Have a producer send; returns once each of the messages was confirmed or given up."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"go {messages} {seconds}\n".encode())
        await self._says(b"done\n")

    async def _says(self, line: bytes) -> None:
        assert self.process.stdout is not None
        if (answer := await self.process.stdout.readline()) != line:
            raise RuntimeError(
                f"{self.name} said {answer!r} instead of {line!r}; see {self._base}.log in {self.folder}"
            )

    async def end(self) -> int:
        """SIGTERM, or the end of the input; its exit status. RuntimeError: it did not end in time, and was killed."""
        if self.process.returncode is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            if self._role == "consume":
                self.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_END):
                return await self.process.wait()
        except TimeoutError:
            await self.kill()
            raise RuntimeError(f"{self.name} was still there {_END:.0f} s after SIGTERM") from None

    async def kill(self) -> int:
        """SIGKILL; the status it ended with, by this or before. 0: it was never started."""
        if self._process is None:
            return 0
        if self.process.returncode is None:
            self.process.kill()
        return await self.process.wait()
