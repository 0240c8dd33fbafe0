"""Redis: plain on one port, TLS on another, one user of its own; the default user, who needs no password, is off."""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from . import apt
from .broker import LOOPBACK, Command, Site, SupplyError

_TIMEOUT = 5.0

# appendfsync no: every command is written before it is answered, and that is enough against a SIGKILL. With everysec a write
# waits up to 2 s for a slow disk. set-proc-title no: the title would overwrite the environment, by which processes are found.
# The default user can't log in but keeps its rights: Redis 7.0 reads its own file back in that user's name, and drops every
# transaction and script that the user may not run.
CONFIG = """\
bind {address}
port {redis}
tls-port {rediss}
tls-cert-file {folder}/server.pem
tls-key-file {folder}/server.key
tls-ca-cert-file {folder}/ca.pem
tls-auth-clients no
user default off resetpass ~* &* +@all
user {user} on >{password} ~* &* +@all
appendonly yes
appendfsync no
save ""
set-proc-title no
maxmemory-policy noeviction
"""


class Redis:
    name = "redis"
    process = "redis-server"
    image = "redis:8.6"
    ports: Sequence[str] = ("redis", "rediss")
    private_ports: Sequence[str] = ()

    def install(self) -> None:
        if shutil.which("redis-server") is None:
            apt.install("redis-server")
        if shutil.which("redis-server") is None:
            raise SupplyError("redis-server is installed, but it is not in PATH")

    def files(self, site: Site) -> Mapping[str, bytes]:
        import trustme  # heavy, and only a first start needs it

        authority = trustme.CA()
        server = authority.issue_cert("localhost", LOOPBACK)
        values = {**site.ports, "address": site.address, "folder": site.folder}
        return {
            "redis.conf": CONFIG.format(**values, user=site.user, password=site.password).encode(),
            "ca.pem": authority.cert_pem.bytes(),
            "server.pem": b"".join(pem.bytes() for pem in server.cert_chain_pems),
            "server.key": server.private_key_pem.bytes(),
        }

    def native(self, site: Site) -> Command:
        return Command(["redis-server", f"{site.folder}/redis.conf", "--dir", site.folder])

    def container(self, site: Site) -> Command:
        return Command(["redis-server", f"{site.folder}/redis.conf", "--dir", "/data"])

    def variables(self, site: Site, files: Path) -> Mapping[str, str]:
        account = f"{site.user}:{site.password}@{LOOPBACK}"
        return {
            "URL": f"redis://{account}:{site.ports['redis']}/0",
            "TLS_URL": f"rediss://{account}:{site.ports['rediss']}/0",
            "CA": str(files / "ca.pem"),
        }

    def settled(self, home: Path) -> bool:
        return True  # see appendfsync above

    def check(self, url: str) -> None:
        parts = urlsplit(url)
        address = (parts.hostname or "localhost", parts.port or 6379)
        with socket.create_connection(address, _TIMEOUT) as link:
            if parts.scheme == "rediss":
                # Whether the certificate is trusted is for the tests to find out; here the question is only who answers.
                context = ssl.create_default_context()
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
                with context.wrap_socket(link) as sealed:
                    _greet(sealed, parts.username, parts.password)
            else:
                _greet(link, parts.username, parts.password)


def _greet(link: socket.socket, user: str | None, password: str | None) -> None:
    """Log in and ping. While it reads its data, a server lets users in and answers the ping with -LOADING."""
    commands = [["PING"]]
    if password:
        commands.insert(0, ["AUTH", *([unquote(user)] if user else []), unquote(password)])
    for words in commands:
        answer = ask(link, *words)
        if not answer.startswith(b"+"):
            raise ConnectionError(f"it answers {words[0]} with {answer[:60]!r}")


def ask(link: socket.socket, *words: str, until: bytes = b"\r\n") -> bytes:
    """The answer to a command, as it is on the wire: an error of one line, or up to its last line, `until`."""
    packed = b"".join(b"$%d\r\n%s\r\n" % (len(word.encode()), word.encode()) for word in words)
    link.sendall(b"*%d\r\n%s" % (len(words), packed))
    answer = b""
    while not answer.endswith(b"\r\n" if answer.startswith(b"-") else until):
        chunk = link.recv(4096)
        if not chunk:
            raise ConnectionError("the connection was closed; it is no Redis server, or it has just ended")
        answer += chunk
    return answer
