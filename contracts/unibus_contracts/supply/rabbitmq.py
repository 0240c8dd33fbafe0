"""RabbitMQ: AMQP 0-9-1 on one port, the same over TLS on another, a user of its own instead of guest.

On a third the management API, with which tests make users of fewer rights. It collects no metrics: they cost time.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from . import apt
from .broker import LOOPBACK, Command, Site, SupplyError

# The real scripts. Debian's wrapper in /usr/sbin switches the user and drops the environment.
_SERVERS = "usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server"
_TIMEOUT = 5.0

CONFIG = """\
listeners.tcp.1 = {address}:{amqp}
listeners.ssl.1 = {address}:{amqps}
ssl_options.cacertfile = {folder}/ca.pem
ssl_options.certfile = {folder}/server.pem
ssl_options.keyfile = {folder}/server.key
ssl_options.verify = verify_none
ssl_options.fail_if_no_peer_cert = false
default_user = {user}
default_pass = {password}
loopback_users = none
management.tcp.ip = {address}
management.tcp.port = {api}
management_agent.disable_metrics_collector = true
disk_free_limit.absolute = 50MB
log.file.level = info
"""


class RabbitMQ:
    name = "rabbitmq"
    process = "beam.smp"
    image = "rabbitmq:4.1"
    ports: Sequence[str] = ("amqp", "amqps", "api")
    private_ports: Sequence[str] = ("dist", "epmd")

    def install(self) -> None:
        if _server() is None:
            apt.install("rabbitmq-server")
        if _server() is None:
            raise SupplyError(f"rabbitmq-server is installed, but its script is not in /{_SERVERS}")

    def files(self, site: Site) -> Mapping[str, bytes]:
        import trustme  # heavy, and only a first start needs it

        authority = trustme.CA()
        server = authority.issue_cert("localhost", LOOPBACK)
        values = {**site.ports, "address": site.address, "folder": site.folder}
        return {
            "rabbitmq.conf": CONFIG.format(**values, user=site.user, password=site.password).encode(),
            "enabled_plugins": b"[rabbitmq_management].\n",
            "ca.pem": authority.cert_pem.bytes(),
            "server.pem": b"".join(pem.bytes() for pem in server.cert_chain_pems),
            "server.key": server.private_key_pem.bytes(),
        }

    def native(self, site: Site) -> Command:
        folder = site.folder
        return Command(
            [str(_server())],
            {
                "RABBITMQ_NODENAME": f"{site.node}@localhost",
                "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
                # Whatever /etc/rabbitmq says is for the machine's own broker, not for this one.
                "RABBITMQ_CONF_ENV_FILE": "/dev/null",
                "RABBITMQ_CONFIG_FILES": f"{folder}/conf.d/*.conf",
                "RABBITMQ_ADVANCED_CONFIG_FILE": f"{folder}/advanced.config",
                "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
                "RABBITMQ_MNESIA_BASE": f"{folder}/mnesia",
                "RABBITMQ_LOG_BASE": f"{folder}/log",
                "RABBITMQ_LOGS": f"{folder}/log/rabbitmq.log",
                # Erlang's own ports listen on every interface unless told otherwise, and epmd is shared by the machine.
                "RABBITMQ_DIST_PORT": str(site.ports["dist"]),
                "ERL_EPMD_ADDRESS": LOOPBACK,
                "ERL_EPMD_PORT": str(site.ports["epmd"]),
                # +S: two schedulers; +sbwt none: no busy waiting, since tests share these cores.
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                    "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none"
                ),
            },
        )

    def container(self, site: Site) -> Command:
        return Command(
            [],
            {
                "RABBITMQ_NODENAME": f"{site.node}@localhost",
                "RABBITMQ_CONFIG_FILE": f"{site.folder}/rabbitmq.conf",
                "RABBITMQ_ENABLED_PLUGINS_FILE": f"{site.folder}/enabled_plugins",
            },
        )

    def variables(self, site: Site, files: Path) -> Mapping[str, str]:
        account = f"{site.user}:{site.password}@{LOOPBACK}"
        return {
            "URL": f"amqp://{account}:{site.ports['amqp']}/",
            "TLS_URL": f"amqps://{account}:{site.ports['amqps']}/",
            "API": f"http://{account}:{site.ports['api']}/api",
            "CA": str(files / "ca.pem"),
        }

    def settled(self, home: Path) -> bool:
        # The register of quorum queues is written a second after a declaration. A queue that isn't in it when the server
        # is killed never gets a leader again (seen on 3.10): RabbitMQ's own matter, and not what a fault test is about.
        for register in home.glob("mnesia/*/quorum/*/names.dets"):
            written = register.read_bytes()
            if not all(queue.name.encode() in written for queue in register.parent.glob("*/")):
                return False
        return True

    def check(self, url: str) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "amqps"
        for host in parts.netloc.rpartition("@")[2].split(","):
            place = urlsplit(f"//{host}")
            address = (place.hostname or "localhost", place.port or (5671 if secure else 5672))
            with socket.create_connection(address, _TIMEOUT) as link:
                if parts.scheme == "http":
                    continue  # the management API: it listens
                if secure:
                    with _anyone().wrap_socket(link) as sealed:
                        _greet(sealed, host)
                else:
                    _greet(link, host)


def _server() -> Path | None:
    """The newest server script: that of the Debian package, else one in PATH (a tarball, Homebrew)."""
    packaged = sorted(Path("/").glob(_SERVERS))
    if packaged:
        return packaged[-1]
    found = shutil.which("rabbitmq-server")
    return None if found is None else Path(os.path.realpath(found))


def _anyone() -> ssl.SSLContext:
    # Whether the certificate is trusted is for the tests to find out; here the question is only who answers.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _greet(link: socket.socket, host: str) -> None:
    """Say hello in AMQP 0-9-1: the answer is a method frame (1) on channel 0, Connection.Start."""
    link.sendall(b"AMQP\x00\x00\x09\x01")
    answer = link.recv(3)
    if answer != b"\x01\x00\x00":
        raise ConnectionError(f"{host} answers, but not as an AMQP 0-9-1 broker: {answer!r}")
