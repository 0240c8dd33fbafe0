"""No password in anything that a run produces: logs of all loggers at DEBUG, reprs, exceptions with all they came from, reports.

What `unibus compare` writes is searched by its own test.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest

from unibus import AuthenticationFailed, Bus, Queue, RetryPolicy
from unibus.translation import chain

SOON = 60.0  # bounds a failure only
BROKERS = ("RABBITMQ", "KAFKA", "REDIS", "SQS")
QUEUE: Queue[bytes] = Queue("secret")
WRONG = "pa@ss/5f1d%:#?&\u00e9"  # of nobody; each of its characters means something in a URL
FORMS = {WRONG, quote(WRONG, safe=""), quote(WRONG), WRONG.encode().hex(), repr(WRONG)[1:-1], str(WRONG.encode())[2:-1]}


@pytest.fixture(params=BROKERS)
def url(request: pytest.FixtureRequest) -> str:
    name = f"UNIBUS_TEST_{request.param}_URL"
    found = os.environ.get(name)
    if not found:
        pytest.fail(f"{name} is not set; `make brokers-up` starts a broker and prints it")
    return found


def password_of(url: str) -> set[str]:
    password = urlsplit(url).password
    return {password, unquote(password)} if password else set()


def wrong(url: str, password: str) -> str:
    """The same broker with another password in the URL."""
    parts = urlsplit(url)
    user = stranger(url)
    return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{parts.netloc.rpartition('@')[2]}").geturl()


def stranger(url: str) -> str:
    """A user whom the broker refuses with a wrong password. The emulator of SQS checks no signatures, and refuses unknown keys."""
    parts = urlsplit(url)
    return "AKIANOBODY" if parts.scheme == "sqs" else parts.username or "nobody"


def everything(thing: Any, depth: int = 5, seen: set[int] | None = None) -> Iterator[str]:
    """The repr of an object of ours and of all that it holds."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    yield repr(thing)
    if not depth:
        return
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple | set | frozenset):
        parts = list(thing)
    elif type(thing).__module__.partition(".")[0].startswith("unibus"):
        slots = [getattr(thing, name, None) for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [*getattr(thing, "__dict__", {}).values(), *slots]
    else:
        return
    for part in parts:
        if type(part) is not str:  # what shows it is the repr above
            yield from everything(part, depth - 1, seen)


def told(error: BaseException) -> Iterator[str]:
    """All that an exception shows, and what it came from."""
    yield from traceback.format_exception(error)
    for one in chain(error):
        yield from (repr(one), str(one), repr(one.args), repr(vars(one)))


def leaks(texts: list[str], forms: set[str]) -> list[str]:
    """Without the password itself: this goes into a report too."""
    return [f"{n}: {text[:60]!r}" for n, text in enumerate(texts) if any(form in text for form in forms)]


def make(url: str, **more: Any) -> Bus:
    return Bus(
        url, config=False, environ={}, service="s", prefix=f"sec{secrets.token_hex(3)}.", channels=[QUEUE], **more
    )


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


async def test_a_run_that_goes_well_and_one_that_fails(url: str, heard: pytest.LogCaptureFixture) -> None:
    bus, texts = make(url), list[str]()

    @bus.consumer(QUEUE, retry=RetryPolicy(max_retries=1, backoff=0))
    async def handle(body: bytes) -> None:
        raise OSError("broken disk")

    async with bus.running():
        await bus.send(QUEUE, b"x")
        async with asyncio.timeout(SOON):
            while not bus.counts.get("dead_lettered"):  # noqa: ASYNC110  # what is waited for has no event
                await asyncio.sleep(0.01)
        texts.append(repr(await bus.health()))
        texts += everything(bus)
        texts += map(str, everything(bus._opened().settings.effective()))
    texts += [*everything(bus), heard.text]
    assert leaks(texts, password_of(url)) == []


@pytest.mark.parametrize("how", ["in the url", "as a setting", "in the environment"])
async def test_a_wrong_password(url: str, how: str, heard: pytest.LogCaptureFixture) -> None:
    plain = urlsplit(url)
    bare = plain._replace(netloc=plain.netloc.rpartition("@")[2]).geturl()
    user = stranger(url)
    if how == "in the url":
        bus = make(wrong(url, WRONG))
    elif how == "as a setting":
        bus = make(bare, username=user, password=WRONG)
    else:
        environ = {"UNIBUS_USERNAME": user, "UNIBUS_PASSWORD": WRONG}
        bus = Bus(bare, config=False, environ=environ, service="s", prefix="sec.", channels=[QUEUE])
    with pytest.raises((AuthenticationFailed, ConnectionError)) as caught:
        async with bus:
            await bus.send(QUEUE, b"x")
    texts = [*told(caught.value), *everything(bus._session), repr(bus), heard.text]
    assert leaks(texts, FORMS) == []


@pytest.mark.timeout(600)
def test_doctor(url: str, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UNIBUS_")}
    texts = []
    for given, options in ((url, ["--json"]), (wrong(url, WRONG), [])):
        command = [sys.executable, "-m", "unibus", "doctor", *options]
        done = subprocess.run(
            command,
            env={**environ, "UNIBUS_URL": given},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.stdout
        texts += [done.stdout, done.stderr]
    assert leaks(texts, FORMS | password_of(url)) == []


@pytest.mark.timeout(600)
def test_reports_of_the_contracts(tmp_path: Path) -> None:
    """JSON and JUnit, of a contract that passes and of brokers that know us not."""
    good = [os.environ.get(f"UNIBUS_TEST_{broker}_URL", "") for broker in ("RABBITMQ", "REDIS")]
    assert all(good), "`make brokers-up` starts the brokers and prints their variables"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UNIBUS_")}
    known = set().union(*map(password_of, good))
    urls = [wrong(good[0], WRONG), good[1]]
    command = [sys.executable, "-m", "unibus_contracts", *urls, "--reports", "reports", "-k", "test_quiet", "-vv"]
    command.append("--junitxml=junit.xml")
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    texts, files = [done.stdout, done.stderr], list[str]()
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            files.append(path.name)
            texts.append(path.read_text(errors="replace"))
    assert {Path(name).suffix for name in files} >= {".json", ".xml"}, files
    assert leaks(texts, FORMS | known) == []
