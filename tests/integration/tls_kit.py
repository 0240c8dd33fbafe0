"""TLS in front of a broker that has none, or other certificates: ends it, and passes on what it finds."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Self

import trustme


class Authority:
    """Signs certificates. `ca_file`: what to trust."""

    def __init__(self, folder: Path, name: str) -> None:
        self._ca = trustme.CA(organization_name=name)
        self._folder, self._name = folder, name
        self.ca_file = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(str(self.ca_file))

    def server(self, *names: str, clients_of: Authority | None = None) -> ssl.SSLContext:
        """For a server of these names; `clients_of`: who must have signed what its clients show."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._ca.issue_cert(*names).configure_cert(context)
        if clients_of is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(clients_of.ca_file)
        return context

    def takes_over(self, context: ssl.SSLContext, *names: str) -> None:
        """From now on a server with this context shows a certificate of ours."""
        self._ca.issue_cert(*names).configure_cert(context)

    def client(self) -> tuple[Path, Path]:
        """Files of a certificate and its key."""
        made = self._ca.issue_cert("client@unibus.example")
        paths = self._folder / f"{self._name}-client.pem", self._folder / f"{self._name}-client.key"
        made.cert_chain_pems[0].write_to_path(str(paths[0]))
        made.private_key_pem.write_to_path(str(paths[1]))
        return paths


class Front:
    """Listens with TLS on 127.0.0.1:`port`. `accepted` counts the links whose handshake went well."""

    def __init__(self, target: tuple[str, int], context: ssl.SSLContext) -> None:
        self._target, self._context = target, context
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.accepted = 0

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._context)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self.cut()

    async def cut(self) -> None:
        """All links that there are."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.get_running_loop().create_task(self._link(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _link(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        answers, server = await asyncio.open_connection(*self._target)
        try:
            await asyncio.gather(self._pump(reader, server), self._pump(answers, client))
        finally:
            client.transport.abort()
            server.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # reset by one of the two
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
