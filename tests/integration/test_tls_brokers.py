"""TLS to every broker: the right authority works, any other and any other name is refused at once, and the error says what to do."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from tests.integration.tls_kit import Authority, Front

from unibus import Bus, ConfigError, Queue

SOON = 60.0  # bounds a failure only
REFUSED = 20.0  # seconds in which a refusal is said, on a machine that may be busy: one try takes a part of a second
SCHEMES = {"RABBITMQ": "amqps", "KAFKA": "kafkas", "REDIS": "rediss", "SQS": "sqs"}
QUEUE: Queue[bytes] = Queue("sealed")


def given(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        pytest.fail(f"{name} is not set; `make brokers-up` starts a broker and prints it")
    return value


class Sealed:
    """One broker. `url`, `ca_file`: where it is had with TLS, and who has signed its certificate."""

    def __init__(self, kind: str, authority: Authority) -> None:
        self.kind = kind
        self.authority = authority
        plain = urlsplit(given(f"UNIBUS_TEST_{kind}_URL"))
        server = urlsplit(parse_qs(plain.query)["endpoint_url"][0]) if kind == "SQS" else plain
        assert server.hostname is not None
        assert server.port is not None
        self.target = server.hostname, server.port
        self._plain = plain
        self._prefix = f"tls{secrets.token_hex(4)}."
        self.url, self.ca_file = "", authority.ca_file
        if kind != "SQS":
            self.url, self.ca_file = given(f"UNIBUS_TEST_{kind}_TLS_URL"), Path(given(f"UNIBUS_TEST_{kind}_CA"))

    def at(self, port: int) -> str:
        """The URL of a front."""
        plain = self._plain
        if self.kind == "SQS":
            return f"sqs://{plain.netloc}?endpoint_url=https://127.0.0.1:{port}&wait=1"
        user, at, _ = plain.netloc.rpartition("@")
        return f"{SCHEMES[self.kind]}://{user}{at}127.0.0.1:{port}{plain.path}"

    def bus(self, url: str, **settings: Any) -> Bus:
        table = {name: str(value) for name, value in settings.items()}
        return Bus(url, config=False, environ={}, service="tls", prefix=self._prefix, channels=[QUEUE], settings=table)

    async def goes_through(self, url: str, **settings: Any) -> None:
        body = secrets.token_bytes(8)
        async with self.bus(url, **settings) as bus, bus.receiver(QUEUE) as receiver:
            await bus.send(QUEUE, body)
            delivery = await receiver.receive(timeout=SOON)
            assert delivery is not None
            assert delivery.body == body
            await delivery.ack()

    async def refusal(self, kind: type[Exception], url: str, **settings: Any) -> str:
        """What is said. Within seconds, and with nothing in it that is secret."""
        begun = time.monotonic()
        with pytest.raises(kind) as caught:
            async with asyncio.timeout(SOON), self.bus(url, **settings):
                pass
        assert time.monotonic() - begun < REFUSED
        if password := self._plain.password:
            assert password not in str(caught.value)
        return str(caught.value)


@pytest.fixture(params=SCHEMES)
async def sealed(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Sealed]:
    """SQS' emulator has no TLS of its own: it is put in front of it."""
    one = Sealed(request.param, Authority(tmp_path, "mine"))
    if one.kind != "SQS":
        yield one
        return
    async with Front(one.target, one.authority.server("127.0.0.1")) as front:
        one.url = one.at(front.port)
        yield one


async def test_only_the_right_authority_is_trusted(sealed: Sealed, tmp_path: Path) -> None:
    await sealed.goes_through(sealed.url, ca_file=sealed.ca_file)
    section = sealed.kind.lower()
    other = Authority(tmp_path, "other")
    for settings in ({"ca_file": other.ca_file}, {}):  # without one: those that the machine trusts
        assert f"set {section}.ca_file" in await sealed.refusal(ConfigError, sealed.url, **settings)
    missing = tmp_path / "nothing.pem"
    assert f"{section}.ca_file: no such file" in await sealed.refusal(ConfigError, sealed.url, ca_file=missing)


async def test_another_name_is_refused(sealed: Sealed) -> None:
    async with Front(sealed.target, sealed.authority.server("broker.example")) as front:
        url = sealed.at(front.port)
        said = await sealed.refusal(ConfigError, url, ca_file=sealed.authority.ca_file)
        assert "mismatch" in said
        assert "use a name of the certificate as the host of url" in said
        assert front.accepted == 0  # nothing was said to it, no password either


@pytest.mark.parametrize(
    "sealed", ["RABBITMQ", "REDIS"], indirect=True
)  # a front hides one address, and Kafka names its own
async def test_a_server_that_wants_a_certificate_gets_ours(sealed: Sealed, tmp_path: Path) -> None:
    clients, ca_file = Authority(tmp_path, "clients"), sealed.authority.ca_file
    async with Front(sealed.target, sealed.authority.server("127.0.0.1", clients_of=clients)) as front:
        cert, key = clients.client()
        await sealed.goes_through(sealed.at(front.port), ca_file=ca_file, cert_file=cert, key_file=key)
        wrong_cert, wrong_key = sealed.authority.client()
        for settings in ({}, {"cert_file": wrong_cert, "key_file": wrong_key}):
            await sealed.refusal(ConnectionError, sealed.at(front.port), ca_file=ca_file, **settings)


@pytest.mark.parametrize("sealed", ["RABBITMQ", "KAFKA", "REDIS"], indirect=True)
async def test_of_several_hosts_each_is_checked(sealed: Sealed) -> None:
    """One that can't be had is passed over; one that shows a wrong certificate ends the search, whatever the others are."""

    def beside(host: str) -> str:
        user, at, hosts = urlsplit(sealed.url).netloc.rpartition("@")
        return urlsplit(sealed.url)._replace(netloc=f"{user}{at}{host},{hosts}").geturl()

    await sealed.goes_through(beside("127.0.0.1:1"), ca_file=sealed.ca_file)
    said = await sealed.refusal(ConfigError, beside("127.0.0.1:1"))
    assert f"set {sealed.kind.lower()}.ca_file" in said
    async with Front(sealed.target, sealed.authority.server("127.0.0.1")) as front:
        said = await sealed.refusal(ConfigError, beside(f"127.0.0.1:{front.port}"), ca_file=sealed.ca_file)
        assert f"127.0.0.1:{front.port}" in said
        assert front.accepted == 0


@pytest.mark.parametrize("sealed", ["REDIS"], indirect=True)  # what becomes of it is the core's
async def test_a_certificate_that_is_not_trusted_any_more_ends_the_link_for_good(
    sealed: Sealed, tmp_path: Path
) -> None:
    """Somebody else may be there now: no password is sent there, and what runs ends with the reason."""
    context = sealed.authority.server("127.0.0.1")
    async with Front(sealed.target, context) as front:
        bus = sealed.bus(sealed.at(front.port), ca_file=sealed.authority.ca_file)
        async with bus:
            await bus.send(QUEUE, b"1")
            accepted = front.accepted
            Authority(tmp_path, "other").takes_over(context, "127.0.0.1")
            await front.cut()

            async def sends_until_it_is_told() -> None:
                while True:
                    await bus.send(QUEUE, b"2")

            with pytest.raises(ConfigError, match=r"set redis\.ca_file"):
                await asyncio.wait_for(sends_until_it_is_told(), SOON)
            assert (await bus.health()).status == "down"
        assert front.accepted == accepted


@pytest.mark.parametrize("sealed", ["RABBITMQ", "SQS"], indirect=True)  # the other two say nothing to a TLS greeting
async def test_a_server_without_tls_is_named_as_such(sealed: Sealed) -> None:
    said = await sealed.refusal(ConnectionError, sealed.at(sealed.target[1]), ca_file=sealed.authority.ca_file)
    assert "speaks no TLS; check scheme and port of url" in said


def test_a_ca_file_without_tls_is_refused(tmp_path: Path) -> None:
    bus = Sealed("SQS", Authority(tmp_path, "mine")).bus(given("UNIBUS_TEST_SQS_URL"), ca_file=tmp_path / "mine.pem")
    with pytest.raises(ConfigError, match=r"sqs\.ca_file needs TLS; use https:// in sqs\.endpoint_url"):
        asyncio.run(bus._open())
