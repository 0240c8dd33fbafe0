"""Dead letters on the command line, doctor, and run in one process."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
from tests.unit.cli_lab import APP, Cli

from unibus import deadletter


def fail(cli: Cli) -> str:
    """An application whose queue has three dead letters: two ValueErrors and a KeyError."""
    app = cli.app()
    cli.ok("declare", "--app", app)
    lines = [{"id": "v1", "total": -1}, {"id": "k1", "total": 0}, {"id": "v2", "total": -2}, {"id": "good"}]
    messages = [f'{{"id": "m-{n}", "key": "c", "body": {body}}}' for n, body in enumerate(lines)]
    cli.ok("send", "orders", "--app", app, text="\n".join(messages).replace("'", '"') + '\n{"body": {"id": "last"}}\n')
    cli.ok("run", app)
    return app


# run


def test_run_until_it_is_stopped(cli: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    app = fail(cli)
    (row,) = cli.ok("channels", "orders", "--app", app, "--json").lines[0]["channels"]
    assert (row["ready"], row["dead_letters"]) == (0, 3)


def test_run_only_some(cli: Cli) -> None:
    app = cli.app()
    cli.ok("declare", "--app", app)
    cli.ok("publish", "order.charged", "x", "--app", app)
    cli.ok("send", "orders", '{"id": "last"}', "--app", app)
    assert "billed" not in cli.ok("run", app, "--only", "orders").out
    assert len(cli.ok("peek", "order.charged", "--app", app).lines) == 1
    done = cli("run", app, "--only", "orders,order.charged.biling")
    assert done.code == 2
    assert "only=order.charged.biling: no handler is at work there; did you mean 'order.charged.billing'?" in done.err


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import unibus\nbus = unibus.Bus()", "has no handlers to run; does a module still have to be imported?"),
        (APP.replace("event: str", "event: str, nonsense: int"), "nonsense"),
        (APP.replace("service=", "lifespan=lifespan, service="), "AssertionError: a tool enters no lifespan"),
    ],
)
def test_run_what_can_not_run(cli: Cli, source: str, says: str) -> None:
    done = cli("run", cli.app(source))
    assert done.code in {1, 2}
    assert says in done.err.splitlines()[-1]


def test_run_without_an_app(cli: Cli) -> None:
    assert cli("run").err == "unibus: which application? unibus run module:bus, or set `app` in unibus.toml\n"


def test_workers_have_no_memory_in_common(cli: Cli) -> None:
    done = cli("run", cli.app(), "--workers", "2")
    assert (done.code, "a memory broker is in one process only" in done.err) == (2, True)


def test_tools_enter_no_lifespan_and_run_no_handler(cli: Cli) -> None:
    app = cli.app(APP.replace("service=", "lifespan=lifespan, service="))
    cli.ok("declare", "--app", app)
    cli.ok("send", "orders", '{"id": "x"}', "--app", app)
    for command in (("channels",), ("doctor",), ("peek", "orders"), ("dlq", "list"), ("dlq", "redrive", "orders")):
        cli.ok(*command, "--app", app)
    assert len(cli.ok("peek", "orders", "--app", app).lines) == 1
    assert sys.modules[app.partition(":")[0]].opened == []


# dlq


def test_list_and_show(cli: Cli, terminal: Callable[[], None]) -> None:
    fail(cli)
    lines = cli.ok("dlq", "list", "orders").lines
    assert [line["id"] for line in lines] == ["m-0", "m-1", "m-2"]
    policy = lines[0]["policy"]
    assert (
        policy.items()
        >= {"x-error-type": "ValueError", "x-original-error": "negative total", "x-retry-count": "1"}.items()
    )
    (shown,) = cli.ok("dlq", "show", "orders", "m-1").lines
    assert shown == lines[1]
    done = cli("dlq", "show", "orders", "m-9")
    assert (done.code, done.err) == (1, "unibus: no dead letter of orders has the id m-9\n")
    terminal()
    done = cli.ok("dlq", "list", "orders")
    assert done.err == "3 messages\n"
    assert "KeyErr" in done.out
    done = cli.ok("dlq", "show", "orders", "m-1")
    assert "x-error-stack-digest" in done.out
    assert '"id": "k1"' in done.out


def test_filters(cli: Cli) -> None:
    fail(cli)

    def ids(*options: str) -> list[str]:
        return [line["id"] for line in cli.ok("dlq", "list", "orders", *options).lines]

    digest = cli.ok("dlq", "list", "orders", "--error", "KeyError").lines[0]["policy"]["x-error-stack-digest"]
    assert ids("--error", "ValueError") == ["m-0", "m-2"]
    assert ids("--error", "Error") == []
    assert ids("--digest", digest[:6].upper()) == ["m-0", "m-1", "m-2"]  # one handler, one path
    assert ids("--digest", "0" * 16) == []
    assert ids("--since", "1h", "--error", "KeyError") == ["m-1"]
    assert ids("--until", "1h") == []
    assert ids("--since", "2020-01-01", "--until", "2999-12-31T23:59:59+02:00") == ["m-0", "m-1", "m-2"]
    assert ids("--id", "m-2", "--id", "m-0") == ["m-0", "m-2"]
    assert ids("-n", "1") == ["m-0"]
    done = cli("dlq", "list", "orders", "--since", "yesterday")
    assert done.err == "unibus: --since 'yesterday': write 30m, 2h or 7d, or a time as in 2026-01-31T12:00\n"


def test_the_overview(cli: Cli, terminal: Callable[[], None]) -> None:
    app = fail(cli)
    assert cli.ok("dlq", "list", "--app", app).lines == [
        {"channel": "orders", "group": None, "dead_letters": 3, "invalid": 0}
    ]
    terminal()
    assert "orders" in cli.ok("dlq", "list", "--app", app).out


def test_redrive(cli: Cli) -> None:
    app = fail(cli)
    assert (
        cli.ok("dlq", "redrive", "orders", "--error", "ValueError", "--dry-run").err == "2 messages would be redriven\n"
    )
    assert cli.ok("dlq", "redrive", "orders", "--error", "ValueError", "--json").lines == [
        {"dry_run": False, "redriven": 2}
    ]
    assert [line["id"] for line in cli.ok("dlq", "list", "orders").lines] == ["m-1"]
    back = cli.ok("peek", "orders", "--app", app).lines
    assert [line["id"] for line in back] == ["m-0", "m-2"]
    assert [line["policy"] for line in back] == [{"x-redrive-count": "1"}] * 2
    assert cli.ok("dlq", "redrive", "orders", "--limit", "5", "--rate", "100").err == "1 message redriven\n"
    assert cli.ok("dlq", "redrive", "orders").err == "0 messages redriven\n"


def test_purge_asks(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(cli)
    done = cli("dlq", "purge", "orders", text="y\n")
    assert (done.code, done.err) == (
        2,
        "unibus: purge asks before it deletes, and nobody is there to answer: say --yes\n",
    )
    assert cli.ok("dlq", "purge", "orders", "--dry-run").err == "3 messages would be deleted\n"
    monkeypatch.setattr("unibus.cli.commands.dlq.answerable", lambda: True)
    done = cli("dlq", "purge", "orders", text="n\n")
    assert (done.code, done.err.endswith("unibus: nothing was deleted\n")) == (1, True)
    assert "Delete 3 dead letters of orders for good?" in done.err
    done = cli("dlq", "purge", "orders", "--error", "KeyError", text="y\n")
    assert (done.code, done.err.endswith("1 message deleted\n")) == (0, True)
    assert cli.ok("dlq", "purge", "orders", "--yes").err == "2 messages deleted\n"
    assert cli.ok("dlq", "purge", "orders", "--yes").err == "0 messages deleted\n"


def test_the_invalid(cli: Cli) -> None:
    app = cli.app()
    cli.ok("declare", "--app", app)
    cli.toml("[queues.orders]")
    cli.ok("send", "orders", '{"total": "many"}')
    cli.ok("send", "orders", '{"id": "last"}')
    cli.ok("run", app)
    (line,) = cli.ok("dlq", "list", "orders", "--invalid").lines
    assert line["body"] == {"total": "many"}
    assert line["policy"]["x-dlq-reason"] == "undecodable"
    assert cli.ok("dlq", "purge", "orders", "--invalid", "-y").err == "1 message deleted\n"


# doctor


def test_doctor_says_where_each_setting_comes_from(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.toml('declare = "verify"\n[queues.orders]\nconcurrency = 3\n')
    monkeypatch.setenv("UNIBUS_SEND_TIMEOUT", "7")
    app = cli.app()
    done = cli("doctor", "--app", app, "--json")
    assert done.code == 1
    settings = {s["key"]: (s["value"], s["source"]) for s in done.lines[0]["settings"]}
    assert settings["url"] == ("memory://cli", "--url")
    assert settings["app"] == (app, "--app")
    assert settings["send_timeout"] == ("7", "environment UNIBUS_SEND_TIMEOUT")
    assert settings["queues.orders.concurrency"] == (3, "unibus.toml [queues.orders]")
    assert settings["service"] == ("billing", "code")
    findings = {f["level"]: f["text"] for f in done.lines[0]["findings"]}
    assert findings["error"].startswith("missing on the broker: queue orders, ")
    assert findings["error"].endswith("`unibus declare` makes them (declare = verify)")
    assert "they end with it" in findings["risk"]
    cli.ok("declare", "--app", app)
    done = cli.ok("doctor", "--app", app)
    assert "all 13 objects that it needs are there" in done.out
    assert "UNIBUS_SEND_TIMEOUT" in done.out


def test_doctor_knows_a_misspelt_table(cli: Cli) -> None:
    cli.toml('[queues.ordrs]\nconcurrency = 3\n[queues.other]\n[topics."order.charged".groups]\nbiling = {}\n')
    notes = [
        f["text"] for f in cli.ok("doctor", "--app", cli.app(), "--json").lines[0]["findings"] if f["level"] == "note"
    ]
    assert notes[0] == "[queues.ordrs]: the application has no queue 'ordrs'; did you mean 'orders'?"
    assert notes[1].startswith("[queues.other]: the application has no queue 'other'; fine if ")
    assert (
        notes[2]
        == "group 'biling' of topic 'order.charged': the application has no such group; did you mean 'billing'?"
    )
    assert notes[3].startswith("missing on the broker: ")


def test_doctor_warns_of_at_most_once(cli: Cli) -> None:
    app = cli.app(APP.replace("@bus.consumer(orders, retry=NONE)", '@bus.consumer(orders, guarantee="at-most-once")'))
    findings = cli.ok("doctor", "--app", app, "--json").lines[0]["findings"]
    assert "consumer handle of queue 'orders' is at-most-once: a crash loses what it runs" in [
        f["text"] for f in findings
    ]


def test_doctor_with_settings_that_are_wrong(cli: Cli) -> None:
    cli.toml("[queues.orders]\nconcurency = 3\n")
    done = cli("doctor")
    assert (done.code, done.out) == (2, "")
    assert "concurency: unknown key; did you mean 'concurrency'?" in done.err


# Signals


@pytest.mark.parametrize(
    ("number", "code", "says"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_winds_up(cli: Cli, monkeypatch: pytest.MonkeyPatch, number: int, code: int, says: str) -> None:
    """What is received and not yet taken goes back, whatever ends the command."""
    fail(cli)
    real = deadletter.redrive

    async def interrupted(*args: Any, **more: Any) -> int:
        os.kill(os.getpid(), number)
        return await real(*args, **{**more, "rate": 0.001, "where": lambda d: d.message.id == "m-0"})

    monkeypatch.setattr(deadletter, "redrive", interrupted)
    done = cli("dlq", "redrive", "orders")
    assert done.code == code
    assert done.err.splitlines()[-1] == f"unibus: {says}"
    assert len(cli.ok("dlq", "list", "orders").lines) + len(cli.ok("peek", "orders").lines) == 3


def test_declare_makes_the_table_of_a_store_and_doctor_names_who_is_effectively_once(cli: Cli) -> None:
    source = APP.replace(
        "@bus.consumer(orders, retry=NONE)",
        f"""
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool
    from unibus.stores.sql import SqlStore

    engine = create_async_engine("sqlite+aiosqlite:///{cli.folder}/handled.db", poolclass=NullPool)

    @bus.consumer(orders, idempotency=SqlStore(engine))""",
    )
    app = cli.app(source)

    def findings() -> list[tuple[str, str]]:
        found = cli("doctor", "--app", app, "--json").lines[0]["findings"]
        return [(f["level"], f["text"]) for f in found if "handle of" in f["text"]]

    ((level, text),) = findings()
    assert level == "note"
    assert "consumer handle of queue 'orders': SqlStore(sqlite, table unibus_handled): there is no such table" in text
    cli.toml('declare = "verify"\n')
    ((level, _),) = findings()
    assert level == "error"
    store = "SqlStore(sqlite, table unibus_handled)"
    assert f"{store} would be made unless it is there\n" in cli.ok("declare", "--app", app, "--dry-run").err
    assert findings()[0][0] == "error"
    assert f"{store} is there\n" in cli.ok("declare", "--app", app).err
    assert findings() == [("ok", f"consumer handle of queue 'orders' is effectively once, by {store}")]
