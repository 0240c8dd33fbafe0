"""docs/cli.md: each command it shows is run, in order, on one memory broker, and prints what is shown; … stands for anything."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.unit.cli_lab import URL, Cli, Done

DOC = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
COMMANDS = {
    "run",
    "declare",
    "send",
    "publish",
    "peek",
    "receive",
    "channels",
    "dlq",
    "doctor",
    "plan",
    "move",
    "compare",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def steps() -> list[tuple[str, list[str]]]:
    """Command lines, and what is printed by each."""
    found: list[tuple[str, list[str]]] = []
    for line in "\n".join(blocks("console")).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line:
            found[-1][1].append(line)
    return found


def pipe(cli: Cli, line: str) -> Done:
    text: str | None = None
    done = Done(0, "", "")
    for part in line.split(" | "):
        program, *arguments = shlex.split(part)
        if program == "cat":
            text = Path(arguments[0]).read_text(encoding="utf-8")
            continue
        assert program == "unibus"
        sys.modules.pop("shop", None)  # each command is a process of its own
        done = cli(*arguments, text=text, url=None)
        assert done.code == 0, (line, done)
        text = done.out
    return done


def test_the_commands_of_the_documentation(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNIBUS_URL", URL)
    (tmp_path / "shop.py").write_text(blocks("python")[0], encoding="utf-8")
    (tmp_path / "unibus.toml").write_text(blocks("toml")[0], encoding="utf-8")
    (tmp_path / "orders.jsonl").write_text('{"id": "o-2"}\n{"id": "o-3"}\n', encoding="utf-8")
    ran: list[Any] = []

    async def run(self: object, *, only: object) -> None:  # for ever; the integration tests do
        ran.append(only)

    async def supervise(command: list[str], count: int, probe: str | None) -> int:
        ran.append(count)
        return 0

    monkeypatch.setattr("unibus.bus.Bus.run", run)
    monkeypatch.setattr("unibus.cli.commands.run.supervise", supervise)
    monkeypatch.setattr("unibus.cli.commands.run._log", lambda level: None)  # of the whole process
    shown = set()
    for line, expected in steps():
        if line.startswith("unibus run") and "--workers" in line:
            monkeypatch.setenv("UNIBUS_URL", "redis://127.0.0.1:1")  # no workers in memory; nothing is connected to
        for url, memory in (("redis://old-1:6379", URL), ("kafka://k1:9092", "memory://new")):
            line = line.replace(url, memory)  # noqa: PLW2901  # the brokers of the page
        if line == "unibus dlq list":
            fail(cli)
        done = pipe(cli, line)
        monkeypatch.setenv("UNIBUS_URL", URL)
        shown |= set(re.findall(r"unibus (\w+)", line))
        printed = done.out + done.err
        for text in expected:
            pattern = r"[^\n]*".join(re.escape(part) for part in re.split(r"\s*…", text))
            assert re.search(pattern, printed), (line, text, printed)
    assert shown == COMMANDS
    assert ran == [None, 4, ["orders", "order.charged.billing"]]


def fail(cli: Cli) -> None:
    """Two orders that have died, put where they would be."""
    import asyncio

    from unibus import Bus, Message, deadletter
    from unibus.channel import Queue, dead_letter_queue
    from unibus.retry import Action, Verdict

    async def die() -> None:
        bus = Bus(URL, config=False, service="test", channels=[Queue("orders")], environ={})
        async with bus:
            ids = {"bad-1", "bad-2"}
            await bus.send_many("orders", [Message(b'{"id": "b", "total": -1}', name) for name in sorted(ids)])
            async with bus.receiver("orders") as receiver:
                while ids and (delivery := await receiver.receive(1)) is not None:
                    if delivery.message.id in ids:
                        ids.discard(delivery.message.id)
                        await delivery.settler.settle(
                            delivery,
                            Verdict(Action.DEAD_LETTER, reason="retries_exhausted", error=ValueError("negative total")),
                        )
            assert not ids
            assert len([letter async for letter in deadletter.browse(bus, "orders")]) == 2
            assert dead_letter_queue(Queue("orders")).name == "orders.dlq"

    asyncio.run(die())


def test_the_example_line_is_a_message() -> None:
    from unibus.channel import Queue
    from unibus.cli.lines import read

    message = read(blocks("json")[0].strip(), Queue("orders"))
    assert (message.id, message.key, message.body) == ("o-1", "c42", b'{"total":12}')


def test_exit_codes() -> None:
    from unibus import ConfigError, ConnectionLost, NotFound, PermissionDenied
    from unibus.cli.run import code_of

    rows = re.findall(r"^\| (\d+) \| (.*) \|$", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    codes = [code_of(error("x")) for error in (NotFound, ConfigError, ConnectionLost, PermissionDenied)]
    assert codes == [1, 2, 3, 4]
    assert {str(code) for code in codes} <= {code for code, _ in rows}
