"""The broker supply without a broker: order of sources, state on disk, ports, processes, what is printed."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from unibus_contracts import supply
from unibus_contracts.supply import __main__ as command_line
from unibus_contracts.supply import apt
from unibus_contracts.supply.broker import Command, Kind, Record, Site, SupplyError, free_ports, wait_until
from unibus_contracts.supply.clusters import Member
from unibus_contracts.supply.elasticmq import ElasticMQ
from unibus_contracts.supply.kafka import Kafka
from unibus_contracts.supply.native import MARK, Native, processes
from unibus_contracts.supply.postgresql import PostgreSQL
from unibus_contracts.supply.rabbitmq import RabbitMQ
from unibus_contracts.supply.redis import Redis
from unibus_contracts.supply.sqs import SQS

ROOT = Path(__file__).parents[2]
KINDS = tuple(supply.KINDS.values())
SITE = Site("rabbitmq", "unibus1", "127.0.0.1", "/f", {"amqp": 1, "amqps": 2, "dist": 3, "epmd": 4, "api": 5}, "u", "p")


class FakeKind:
    """A broker that is one `sleep`, and answers wherever `alive` says so."""

    name = "fake"
    process = "sleep"
    image = "fake:1"
    ports: Sequence[str] = ("main",)
    private_ports: Sequence[str] = ("inner",)

    def __init__(self) -> None:
        self.alive: set[str] = set()
        self.argv: Sequence[str] = ["sleep", "600"]
        self.missing = ""
        self.mute = False

    def install(self) -> None:
        if self.missing:
            raise SupplyError(self.missing)

    def files(self, site: Site) -> Mapping[str, bytes]:
        return {"fake.conf": f"port = {site.ports['main']}".encode()}

    def native(self, site: Site) -> Command:
        self.alive.add(self.variables(site, Path())["URL"])
        return Command(self.argv)

    def container(self, site: Site) -> Command:
        self.alive.add(self.variables(site, Path())["URL"])
        return Command([])

    def variables(self, site: Site, files: Path) -> Mapping[str, str]:
        return {
            "URL": f"fake://{site.user}:{site.password}@127.0.0.1:{site.ports['main']}/",
            "CA": str(files / "ca.pem"),
        }

    def settled(self, home: Path) -> bool:
        return True

    def check(self, url: str) -> None:
        if self.mute or url not in self.alive:
            raise ConnectionRefusedError(url.rpartition("@")[2])


class FakeDocker(Native):
    """Docker as far as the supply can tell: same processes, other name."""

    source = "docker"
    reason: str | None = None

    def unavailable(self) -> str | None:
        return self.reason


@pytest.fixture
def docker() -> FakeDocker:
    return FakeDocker()


@pytest.fixture
def kind(docker: FakeDocker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeKind]:
    fake = FakeKind()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    for name in list(supply.KINDS):
        monkeypatch.delitem(supply.KINDS, name)
    for name in list(supply.STORES):
        monkeypatch.delitem(supply.STORES, name)
    monkeypatch.setitem(supply.KINDS, "fake", fake)
    monkeypatch.setattr(supply, "_SOURCES", (docker, Native()))
    monkeypatch.delenv("UNIBUS_TEST_FAKE_URL", raising=False)
    yield fake
    supply.stop()


def pid_of(broker: supply.Broker) -> int:
    """A fake broker answers before its process has become the `sleep` that it is."""
    assert wait_until(lambda: broker.pid is not None, 10)
    return broker.pid or 0


def state_of(pid: int | None) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class FakeThree:
    """Two that start at once, and one that joins them."""

    name = "fake"
    shared: Sequence[str] = ("inner",)

    def __init__(self, kind: FakeKind) -> None:
        self.members = tuple(Member(str(n), kind, later=n == 3) for n in (1, 2, 3))
        self.asked: list[list[str]] = []

    def files(self, sites: Sequence[Site], at: int) -> Mapping[str, bytes]:
        return {"secret": sites[0].password.encode()}

    def url(self, sites: Sequence[Site]) -> str:
        return "fake://" + ",".join(str(site.ports["main"]) for site in sites)

    def formed(self, sites: Sequence[Site]) -> bool:
        self.asked.append([site.name for site in sites])
        if len(self.asked) == 1:
            raise ConnectionRefusedError
        return True


@pytest.fixture
def three(kind: FakeKind, monkeypatch: pytest.MonkeyPatch) -> FakeThree:
    made = FakeThree(kind)
    monkeypatch.setattr(supply, "ASSEMBLIES", {"fake": made})
    monkeypatch.setattr(command_line, "ASSEMBLIES", {"fake": made})
    return made


def test_the_members_of_a_cluster_start_in_their_order_and_are_brokers(three: FakeThree, kind: FakeKind) -> None:
    cluster = supply.cluster("fake", instance="mine")
    names = [f"fake-cluster-mine-{n}" for n in (1, 2, 3)]
    assert [node.name for node in cluster.nodes] == names
    assert three.asked == [names[:2], names[:2], names]
    sites = [node.record.site for node in cluster.nodes if node.record is not None]
    assert len({site.ports["main"] for site in sites}) == len({site.node for site in sites}) == 3
    assert len({site.ports["inner"] for site in sites}) == len({site.password for site in sites}) == 1
    assert all((node.home / "secret").stat().st_mode & 0o777 == 0o600 for node in cluster.nodes)
    pids = [pid_of(node) for node in cluster.nodes]
    cluster.nodes[1].kill()
    cluster.nodes[1].restart()
    assert [pid_of(node) == pid for node, pid in zip(cluster.nodes, pids, strict=True)] == [True, False, True]
    assert supply.cluster("fake", instance="mine").url == cluster.url, "the same, while all of it answers"
    kind.alive.discard(cluster.nodes[2].url)
    assert supply.cluster("fake", instance="mine").url != cluster.url
    cluster.stop()
    assert [processes(node.home) for node in cluster.nodes] == [{}, {}, {}]


def test_a_cluster_on_the_command_line(three: FakeThree, kind: FakeKind, capsys: pytest.CaptureFixture[str]) -> None:
    supply.start("fake")
    assert command_line.main(["cluster-up", "--only", "fake"]) == 0
    assert capsys.readouterr().out == f"UNIBUS_TEST_FAKE_CLUSTER_URL={supply.cluster('fake').url}\n"
    assert command_line.main(["cluster-down"]) == 0
    assert "fake: stopped" not in capsys.readouterr().err
    assert supply.stop() == ["fake"], "that was none of the cluster's"


def test_a_cluster_that_does_not_come_together_says_so(three: FakeThree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supply, "_READY", 0.5)
    monkeypatch.setattr(three, "formed", lambda sites: False)
    with pytest.raises(SupplyError, match="fake-cluster-1 and the others answer, but are no cluster"):
        supply.cluster("fake")
    assert [processes(Path.cwd() / ".brokers" / f"fake-cluster-{n}") for n in (1, 2, 3)] == [{}, {}, {}]
    with pytest.raises(SupplyError, match="no cluster of 'sqs'; there are: fake"):
        supply.cluster("sqs")


def test_docker_comes_before_native(kind: FakeKind, docker: FakeDocker) -> None:
    assert supply.start("fake").source == "docker"
    supply.stop()
    docker.reason = "no engine"
    assert supply.start("fake").source == "native"


def test_the_environment_comes_first_and_is_left_alone(kind: FakeKind, monkeypatch: pytest.MonkeyPatch) -> None:
    kind.alive.add("fake://elsewhere/")
    monkeypatch.setenv("UNIBUS_TEST_FAKE_CA", "/their/ca.pem")
    monkeypatch.setenv("UNIBUS_TEST_FAKE_URL", "fake://elsewhere/")
    broker = supply.start("fake")
    assert (broker.source, broker.url, broker.native) == ("environment", "fake://elsewhere/", False)
    assert broker.variables == {"UNIBUS_TEST_FAKE_URL": "fake://elsewhere/", "UNIBUS_TEST_FAKE_CA": "/their/ca.pem"}
    for disturb in (broker.kill, broker.restart, broker.pause, broker.unpause, broker.stop):
        with pytest.raises(SupplyError, match=r"UNIBUS_TEST_FAKE_URL .*instance="):
            disturb()
    assert supply.start("fake", instance="mine").source == "docker"


def test_an_unreachable_url_in_the_environment_names_the_variable(
    kind: FakeKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNIBUS_TEST_FAKE_URL", "fake://user:secret@nowhere/")
    with pytest.raises(SupplyError, match="UNIBUS_TEST_FAKE_URL is set, but no broker answers") as caught:
        supply.start("fake")
    assert "secret" not in str(caught.value)
    with pytest.raises(SupplyError, match="UNIBUS_TEST_FAKE_URL"):
        supply.running(["fake"])


def test_a_url_that_the_supply_printed_is_its_own_broker(kind: FakeKind, monkeypatch: pytest.MonkeyPatch) -> None:
    first = supply.start("fake")
    monkeypatch.setenv("UNIBUS_TEST_FAKE_URL", first.url)
    again = supply.start("fake")
    assert (again.source, pid_of(again)) == ("docker", pid_of(first))


def test_a_source_that_fails_is_said_and_the_next_one_tried(
    kind: FakeKind, docker: FakeDocker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def create(*_: object) -> None:
        raise SupplyError("image can't be pulled")

    monkeypatch.setattr(docker, "create", create)
    assert supply.start("fake").source == "native"
    assert "fake: docker: image can't be pulled" in capsys.readouterr().err


def test_a_broker_that_cannot_be_had_is_an_error_with_every_reason(kind: FakeKind, docker: FakeDocker) -> None:
    docker.reason = "no engine answers"
    kind.missing = "fake-server is not installed"
    with pytest.raises(SupplyError) as caught:
        supply.start("fake")
    for part in ("UNIBUS_TEST_FAKE_URL", "docker: no engine answers", "native: fake-server is not installed"):
        assert part in str(caught.value)


def test_the_error_of_a_broker_that_ends_by_itself_shows_its_log(kind: FakeKind, docker: FakeDocker) -> None:
    docker.reason = "no engine"
    kind.mute = True
    kind.argv = ["sh", "-c", "echo port 5 is taken; exit 1"]
    with pytest.raises(SupplyError, match=r"ended by itself.*(?s:.)*\| port 5 is taken"):
        supply.start("fake")
    assert processes(Path.cwd() / ".brokers" / "fake") == {}


def test_up_twice_is_one_broker_and_down_leaves_nothing(kind: FakeKind) -> None:
    first, second = supply.start("fake"), supply.start("fake")
    private = supply.start("fake", instance="faults")
    assert first.variables == second.variables
    assert pid_of(first) == pid_of(second) != pid_of(private)
    assert [broker.url for broker in supply.running()] == [first.url]
    assert supply.stop() == ["fake", "fake-faults"]
    assert processes(first.home) == processes(private.home) == {}
    assert [entry.name for entry in first.home.iterdir()] == ["log"]
    with pytest.raises(SupplyError, match="make brokers-up"):
        supply.running()
    first.stop()  # once more does nothing


def test_a_dead_broker_is_replaced(kind: FakeKind) -> None:
    first = supply.start("fake")
    kind.alive.clear()
    second = supply.start("fake")
    assert second.url != first.url


def test_kill_and_restart_keep_files_and_ports(kind: FakeKind) -> None:
    broker = supply.start("fake", instance="faults")
    (broker.home / "data").touch()
    first = pid_of(broker)
    broker.kill()
    assert broker.pid is None
    broker.restart()
    second = pid_of(broker)
    broker.restart()
    assert len({first, second, pid_of(broker)}) == 3
    assert (broker.home / "data").exists()
    assert supply.start("fake", instance="faults").url == broker.url


def test_one_that_is_paused_does_nothing_and_can_be_killed_and_restarted(kind: FakeKind) -> None:
    broker = supply.start("fake", instance="faults")
    pid = pid_of(broker)
    for end in (broker.unpause, broker.restart, broker.kill):
        broker.pause()
        assert wait_until(lambda: state_of(broker.pid) == "T", 10)
        end()
        if end == broker.unpause:
            assert wait_until(lambda: state_of(pid) == "S", 10)
            assert broker.pid == pid
        elif end == broker.restart:
            assert pid_of(broker) != pid
    with pytest.raises(SupplyError, match="fake-faults isn't running, so it gets no SIGSTOP"):
        broker.pause()


def test_only_processes_with_the_mark_are_ours(kind: FakeKind) -> None:
    with subprocess.Popen(["sleep", "600"]) as foreign:
        broker = supply.start("fake")
        broker.stop()
        assert foreign.poll() is None
        foreign.send_signal(signal.SIGTERM)


def test_names_that_would_leave_the_folder_are_refused(kind: FakeKind) -> None:
    with pytest.raises(SupplyError, match="lower-case letters"):
        supply.start("fake", instance="../x")
    with pytest.raises(SupplyError, match="there are: fake"):
        supply.start("kafak")


def test_brokers_live_in_the_checkout_whatever_its_subfolder(
    kind: FakeKind, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path / "tests")
    assert supply.start("fake").home == tmp_path / ".brokers" / "fake"


def test_state_survives_the_disk_and_is_private(tmp_path: Path) -> None:
    record = Record("rabbitmq", "native", SITE, {"URL": "amqp://u:p@127.0.0.1:1/"})
    record.save(tmp_path)
    assert Record.load(tmp_path) == record
    assert (tmp_path / "broker.json").stat().st_mode & 0o777 == 0o600
    assert Record.load(tmp_path / "nowhere") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"site": {}}', '{"kind": "fake", "site": {"name": "x"}}'])
def test_state_of_another_version_is_ignored_aloud(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broker.json").write_text(text)
    assert Record.load(tmp_path) is None
    assert "another version" in capsys.readouterr().err


def test_ports_are_different_and_below_the_ephemeral_range() -> None:
    ports = free_ports([str(n) for n in range(50)])
    assert len(set(ports.values())) == 50
    ceiling = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports.values()) < ceiling


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else's ports have a say: the one that is looked at first is ours, and stays so."""
    sample = random.sample
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: int = server.getsockname()[1]
        monkeypatch.setattr(random, "sample", lambda population, k: [taken, *sample(population, k=k)])
        assert taken not in free_ports([str(n) for n in range(3)]).values()


def test_what_is_printed_sets_the_variables_in_a_shell(kind: FakeKind, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["up"]) == 0
    printed = capsys.readouterr()
    values = dict(line.split("=", 1) for line in printed.out.splitlines())
    assert list(values) == ["UNIBUS_TEST_FAKE_URL", "UNIBUS_TEST_FAKE_CA"]
    assert values["UNIBUS_TEST_FAKE_URL"] == supply.start("fake").url
    assert command_line.main(["urls"]) == 0
    assert capsys.readouterr().out == printed.out


def test_values_are_quoted_for_the_shell(kind: FakeKind) -> None:
    broker = dataclasses.replace(supply.start("fake"), variables={"X_URL": "fake://h/?a=1&b=$HOME two"})
    (line,) = command_line.lines([broker])
    assert shlex.split(line) == ["X_URL=fake://h/?a=1&b=$HOME two"]
    echoed = subprocess.run(["sh", "-c", f'{line}; printf %s "$X_URL"'], capture_output=True, text=True, check=True)
    assert echoed.stdout == broker.url


def test_a_failing_command_prints_no_url(kind: FakeKind, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["urls"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: fake isn't running")


def test_rabbitmq_listens_on_loopback_only_and_knows_no_guest() -> None:
    kind: Kind = RabbitMQ()
    config = kind.files(SITE)["rabbitmq.conf"].decode()
    assert set(re.findall(r"^listeners.*= (\S+):\d+$", config, re.MULTILINE)) == {"127.0.0.1"}
    assert "management.tcp.ip = 127.0.0.1\n" in config
    assert "default_user = u\n" in config
    assert "guest" not in config
    environment = kind.native(SITE).environment
    assert environment["ERL_EPMD_ADDRESS"] == "127.0.0.1"
    assert environment["ERL_EPMD_PORT"] == "4"
    assert "inet_dist_use_interface {127,0,0,1}" in environment["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"]


def test_kafka_listens_on_loopback_only_and_refuses_by_default() -> None:
    kind = Kafka()
    site = Site(
        "kafka", "unibus1", "127.0.0.1", "/f", {"sasl": 1, "tls": 2, "controller": 3, "behind": 4, "front": 5}, "u", "p"
    )
    config = dict(line.split("=", 1) for line in kind.files(site)["server.properties"].decode().splitlines())
    assert all("://127.0.0.1:" in listener for listener in config["listeners"].split(","))
    assert "PLAINTEXT:PLAINTEXT" not in config["listener.security.protocol.map"].replace("CONTROLLER:PLAINTEXT", "")
    assert config["super.users"] == "User:u;User:ANONYMOUS"
    assert "allow.everyone.if.no.acl.found" not in config


def test_redis_listens_on_loopback_only_and_lets_in_one_user() -> None:
    kind: Kind = Redis()
    site = dataclasses.replace(SITE, ports={"redis": 1, "rediss": 2})
    config = kind.files(site)["redis.conf"].decode()
    assert re.findall(r"^bind (.+)$", config, re.MULTILINE) == ["127.0.0.1"]
    assert [line.split()[:3] for line in re.findall(r"^user (.+)$", config, re.MULTILINE)] == [
        ["default", "off", "resetpass"],
        ["u", "on", ">p"],
    ]
    assert kind.variables(site, Path("/f"))["URL"] == "redis://u:p@127.0.0.1:1/0"


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ([b"+OK\r\n", b"+PONG\r\n"], ""),
        ([b"-WRONGPASS no\r\n"], "AUTH"),
        ([b"+OK\r\n", b"-LOADING\r\n"], "PING"),
        ([b""], "no Redis"),
    ],
)
def test_the_check_of_redis_logs_in_and_pings(answers: list[bytes], text: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as link:
                for answer in answers:
                    link.recv(1000)
                    link.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"redis://u:p@127.0.0.1:{server.getsockname()[1]}/0"
        if text:
            with pytest.raises(ConnectionError, match=text):
                Redis().check(url)
        else:
            Redis().check(url)
        thread.join(10)


def test_the_emulator_of_sqs_listens_on_loopback_only_and_knows_no_default_key() -> None:
    site = Site("sqs", "unibus1", "127.0.0.1", "/f", {"http": 1}, "u", "p")
    command = SQS().native(site)
    environment = command.environment
    assert (environment["BIND_HOST"], environment["GATEWAY_PORT"], environment["AUTH"]) == ("127.0.0.1", "1", "true")
    assert (environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]) == ("u", "p")
    assert not {environment["IOT_MTLS_ENABLED"], environment["SFTP_ENABLED"]} - {"0"}
    assert SQS().variables(site, Path("/f"))["URL"] == "sqs://u:p@eu-west-1?endpoint_url=http://127.0.0.1:1&wait=1"


def test_the_strict_emulator_of_sqs_listens_on_loopback_only() -> None:
    site = Site("elasticmq", "unibus1", "127.0.0.1", "/f", {"http": 1}, "u", "p")
    argv = ElasticMQ().native(site).argv
    assert {"-Drest-sqs.bind-hostname=127.0.0.1", "-Drest-sqs.sqs-limits=strict", "-Drest-stats.enabled=false"} <= {
        *argv
    }
    assert "elasticmq" not in supply.KINDS  # so that nobody starts it who has not asked for it


def test_a_kill_waits_until_rabbitmq_has_registered_its_quorum_queues(tmp_path: Path) -> None:
    kind = RabbitMQ()
    assert kind.settled(tmp_path)
    folder = tmp_path / "mnesia" / "n@localhost" / "quorum" / "n@localhost"
    (folder / "2F_ORDERS").mkdir(parents=True)
    (folder / "names.dets").write_bytes(b"...")
    assert not kind.settled(tmp_path)
    (folder / "names.dets").write_bytes(b"...2F_ORDERS...")
    assert kind.settled(tmp_path)


@pytest.mark.parametrize(("answer", "well"), [(b"\x01\x00\x00rest", True), (b"HTTP/1.1 400", False), (b"", False)])
def test_only_an_amqp_broker_counts_as_one(answer: bytes, well: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            link, _ = server.accept()
            with link:
                link.recv(8)
                link.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"amqp://u:p@127.0.0.1:{server.getsockname()[1]}/"
        if well:
            RabbitMQ().check(url)
        else:
            with pytest.raises(ConnectionError, match="not as an AMQP 0-9-1 broker"):
                RabbitMQ().check(url)
        thread.join(10)


def test_compose_and_supply_use_the_same_version_on_loopback_only() -> None:
    compose = (ROOT / "docker-compose.test.yml").read_text()
    images = re.findall(r"image: (\S+)", compose)
    wanted = {kind.name: kind.image for kind in (*supply.KINDS.values(), *supply.STORES.values())}
    wanted["rabbitmq"] += "-management"
    assert set(images) == set(wanted.values())
    published = re.findall(r'"([^"]*:\d+:\d+)"', compose)
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_installing_a_package_does_not_start_its_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    policy = tmp_path / "policy-rc.d"
    monkeypatch.setattr(apt, "POLICY", policy)
    with apt.services_stay_down():
        assert subprocess.run([str(policy)], check=False).returncode == 101
    assert not policy.exists()
    policy.write_text("theirs")
    with apt.services_stay_down():
        assert policy.read_text() == "theirs"
    assert policy.read_text() == "theirs"


def test_without_root_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/apt-get")
    with pytest.raises(SupplyError, match="as root: apt-get install --no-install-recommends rabbitmq-server"):
        apt.install("rabbitmq-server")


def test_the_supply_imports_without_docker_or_cryptography() -> None:
    code = "import sys, unibus_contracts.supply; print([m for m in ('docker', 'cryptography', 'unibus') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_waiting_ends_at_the_deadline() -> None:
    assert wait_until(lambda: True, 0)
    assert not wait_until(lambda: False, 0)


def test_a_child_that_shows_no_mark_is_found_by_its_parent(tmp_path: Path) -> None:
    """As those of PostgreSQL, which write over their environment."""
    shell = subprocess.Popen(["/bin/sh", "-c", "env -i sleep 600 & wait"], env={MARK: str(tmp_path)})
    try:
        assert wait_until(lambda: "sleep" in processes(tmp_path).values(), 60)
        assert next(iter(processes(tmp_path))) == shell.pid
    finally:
        for pid in processes(tmp_path):
            os.kill(pid, signal.SIGKILL)
        shell.wait()


@pytest.mark.parametrize(("answer", "well"), [(b"R\0\0\0\x17", True), (b"E\0\0\0\x20starting up", False), (b"", False)])
def test_postgresql_is_there_when_it_asks_who_we_are(answer: bytes, well: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            link, _ = server.accept()
            with link:
                link.recv(100)
                link.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"postgresql://u:p@127.0.0.1:{server.getsockname()[1]}/x"
        if well:
            PostgreSQL().check(url)
        else:
            with pytest.raises(ConnectionError, match="not as a PostgreSQL server that is ready"):
                PostgreSQL().check(url)
        thread.join(10)
