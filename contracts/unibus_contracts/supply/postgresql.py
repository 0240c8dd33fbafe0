"""PostgreSQL: no broker, but where a store of handled messages lives (`unibus.stores.sql`). One user, who logs in with a password."""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from . import apt
from .broker import LOOPBACK, Command, Site, SupplyError

_SERVERS = "usr/lib/postgresql/*/bin/postgres"  # where Debian has them, outside of PATH
_TIMEOUT = 5.0
_VERSION_3 = 196608  # of the protocol

# It refuses to run as root. The user of Debian's package may not pass through root's folders, so that one right stays.
# fsync off: what was written survives a SIGKILL all the same, and a test machine that loses its power has lost the test.
SCRIPT = """\
set -eu
as=
if [ "$(id -u)" = 0 ]; then
    as="setpriv --reuid=postgres --regid=postgres --clear-groups --inh-caps=+dac_override --ambient-caps=+dac_override"
    mkdir -p data && chown postgres:postgres data
fi
if [ ! -e data/PG_VERSION ]; then
    $as "$1/initdb" -D "$2/data" -U "$3" --pwfile="$2/password" --auth=scram-sha-256 --encoding=UTF8 --no-locale --no-sync
fi
exec $as "$1/postgres" -D "$2/data" -p "$4" -c "listen_addresses=$5" -c unix_socket_directories= -c fsync=off
"""


class PostgreSQL:
    name = "postgresql"
    process = "postgres"
    image = "postgres:17"
    ports: Sequence[str] = ("postgresql",)
    private_ports: Sequence[str] = ()

    def install(self) -> None:
        if _server() is None:
            apt.install("postgresql")
        if _server() is None:
            raise SupplyError(f"postgresql is installed, but there is no server in /{_SERVERS}")

    def files(self, site: Site) -> Mapping[str, bytes]:
        return {"password": site.password.encode()}

    def native(self, site: Site) -> Command:
        server = _server()
        if server is None:
            raise SupplyError("the PostgreSQL server that was here is gone")
        arguments = (str(server.parent), site.folder, site.user, str(site.ports["postgresql"]), site.address)
        return Command(["/bin/sh", "-c", SCRIPT, "postgresql", *arguments])

    def container(self, site: Site) -> Command:
        return Command(
            ["postgres", "-p", str(site.ports["postgresql"]), "-c", "fsync=off"],
            {"POSTGRES_USER": site.user, "POSTGRES_PASSWORD": site.password, "POSTGRES_DB": "postgres"},
        )

    def variables(self, site: Site, files: Path) -> Mapping[str, str]:
        return {"URL": f"postgresql://{site.user}:{site.password}@{LOOPBACK}:{site.ports['postgresql']}/postgres"}

    def settled(self, home: Path) -> bool:
        return True

    def check(self, url: str) -> None:
        parts = urlsplit(url)
        user = unquote(parts.username or "postgres").encode()
        body = struct.pack("!i", _VERSION_3) + b"user\0" + user + b"\0\0"
        with socket.create_connection((parts.hostname or "localhost", parts.port or 5432), _TIMEOUT) as link:
            link.sendall(struct.pack("!i", len(body) + 4) + body)
            answer = link.recv(1)
        if answer != b"R":  # it asks who we are; an E says that it is not ready yet
            raise ConnectionError(f"it answers, but not as a PostgreSQL server that is ready: {answer!r}")


def _server() -> Path | None:
    """The newest of Debian's packages, else the one in PATH."""
    packaged = sorted(Path("/").glob(_SERVERS), key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))])
    if packaged:
        return packaged[-1]
    found = shutil.which("postgres")
    return None if found is None else Path(os.path.realpath(found))
