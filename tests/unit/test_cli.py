"""The command line on a memory broker: declare, send, publish, peek, receive, channels, and what goes wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.cli_lab import URL, Cli

from unibus.cli import main

TOML = """
    declare = "assume"
    [queues.orders]
    [queues.plan]
    delayed = true
    priorities = 3
    [topics.events.groups]
    billing = {}
    audit = {}
    [topics.lonely]
"""


# declare


def test_declare_makes_what_is_missing_whatever_the_mode(cli: Cli) -> None:
    cli.toml(TOML)
    dry = cli.ok("declare", "--dry-run", "--json").lines[0]
    assert {
        "kind": "queue",
        "name": "orders.dlq",
        "of": "queue 'orders.dlq'",
        "state": "missing",
        "rights": "none",
    } in dry["objects"]
    assert {one["state"] for one in dry["objects"]} == {"missing"}
    assert cli("send", "orders", "1").code == 1  # the dry run has made nothing
    assert {one["state"] for one in cli.ok("declare", "--json").lines[0]["objects"]} == {"made"}
    assert {one["state"] for one in cli.ok("declare", "--dry-run", "--json").lines[0]["objects"]} == {"exists"}
    cli.ok("send", "orders", "1")


def test_declare_prints_a_table(cli: Cli) -> None:
    cli.toml(TOML)
    done = cli.ok("declare")
    assert "events.billing.dlq" in done.out
    assert done.err == "14 objects made; 0 are there\n"
    assert cli.ok("declare").err == "0 objects made; 14 are there\n"


def test_tools_declare_nothing(cli: Cli) -> None:
    cli.toml("[queues.orders]")  # declare = create, at the start of a service
    done = cli("send", "orders", "1")
    assert (done.code, done.err) == (1, "unibus: queue 'orders' does not exist on the memory broker; declare it\n")


# send, publish, peek, receive


def test_what_was_received_can_be_sent_again(cli: Cli) -> None:
    cli.toml(TOML)
    cli.ok("declare")
    (sent,) = cli.ok("send", "orders", '{"total": 1.5}', "--key", "c42", "-H", "tenant=north", "-H", "a=b=c").lines
    (line,) = cli.ok("peek", "orders").lines
    assert line.pop("timestamp") > 0
    assert line == {
        "id": sent["id"],
        "correlation_id": sent["id"],
        "key": "c42",
        "headers": {"tenant": "north", "a": "b=c"},
        "content_type": "application/json",
        "body": {"total": 1.5},
        "deliveries": 0,
    }
    received = cli.ok("receive", "orders", "--ack")
    cli.ok("send", "orders", text=received.out)
    assert cli.ok("peek", "orders").lines[0]["id"] == sent["id"]
    assert len(cli.ok("peek", "orders").lines) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"body": {"ü": [1, None, True]}},
        {"body": "a JSON string"},
        {"text": "héllo\nworld", "content_type": "text/plain; charset=utf-8"},
        {"text": "<a/>", "content_type": "application/xml"},
        {"base64": "AP8=", "content_type": "application/octet-stream"},
        {
            "body": 1,
            "type": "order.made",
            "correlation_id": "c",
            "causation_id": "d",
            "reply_to": "inbox.x",
            "key": "k",
        },
        {"body": 1, "id": "i-1", "timestamp": 1700000000.5, "expires_at": 4000000000.0},
    ],
)
def test_a_line_comes_out_as_it_went_in(cli: Cli, fields: dict[str, object]) -> None:
    cli.toml(TOML)
    cli.ok("declare")
    cli.ok("send", "orders", text=json.dumps(fields))
    (line,) = cli.ok("receive", "orders", "--ack").lines
    assert line.items() >= fields.items()


def test_many_lines_and_what_is_wrong_with_some(cli: Cli) -> None:
    cli.toml(TOML)
    cli.ok("declare")
    text = '{"body": 1}\n\nnot json\n{"total": 2}\n{"body": 3, "colour": "red"}\n{"body": 4, "delay": 5}\n{"body": 5}\n'
    done = cli("send", "orders", text=text)
    assert done.code == 1
    assert len(done.lines) == 2
    assert [line["body"] for line in cli.ok("peek", "orders").lines] == [1, 5]
    errors = done.err.splitlines()
    assert errors[0] == "unibus: line 3: is not JSON (column 1)"
    assert errors[1].startswith("unibus: line 4: is not a message: ")
    assert "--bodies" in errors[1]
    assert errors[2].startswith("unibus: line 5: 'colour' is no field of a message")
    assert errors[3].startswith("unibus: line 6: queue 'orders' was not declared with delayed=True")
    assert errors[4] == "unibus: 2 messages sent, 4 not"


def test_bodies_alone_and_the_options_for_all(cli: Cli) -> None:
    cli.toml(TOML)
    cli.ok("declare")
    done = cli.ok(
        "send", "plan", "--bodies", "--priority", "2", "-k", "x", "--expires-in", "60", text='{"a":1}\n{"a":2}\n'
    )
    assert len(done.lines) == 2
    lines = cli.ok("receive", "plan", "-n", "9", "--wait", "0").lines
    assert [(line["body"], line["key"], line["priority"]) for line in lines] == [({"a": 1}, "x", 2), ({"a": 2}, "x", 2)]
    assert all(59 < line["expires_at"] - line["timestamp"] <= 60 for line in lines)


def test_a_delay(cli: Cli) -> None:
    cli.toml(TOML)
    cli.ok("declare")
    cli.ok("send", "plan", "1", "--delay", "3600")
    assert cli.ok("peek", "plan").lines == []
    (row,) = cli.ok("channels", "plan", "--json").lines[0]["channels"]
    assert (row["ready"], row["delayed"]) == (0, 1)


def test_receive_gives_back_what_it_does_not_ack(cli: Cli) -> None:
    cli.toml(TOML)
    cli.ok("declare")
    cli.ok("send", "orders", "--bodies", text="1\n2\n3\n")
    done = cli.ok("receive", "orders", "-n", "2")
    assert [line["body"] for line in done.lines] == [1, 2]
    assert done.err == "2 messages given back; --ack takes them\n"
    assert [line["body"] for line in cli.ok("receive", "orders", "-n", "2", "--ack").lines] == [1, 2]
    assert [line["body"] for line in cli.ok("receive", "orders", "-n", "9", "--wait", "0", "--ack").lines] == [3]
    done = cli.ok("receive", "orders", "--wait", "0")
    assert (done.out, done.err) == ("", "queue 'orders': nothing waits there\n")


def test_groups(cli: Cli) -> None:
    cli.toml(TOML)
    cli.ok("declare")
    cli.ok("publish", "events", '"hello"')
    for group in ("billing", "audit"):
        assert cli.ok("peek", "events", "--group", group).lines[0]["body"] == "hello"
    done = cli("peek", "events")
    assert (done.code, done.err) == (
        2,
        "unibus: topic 'events': which of its groups? Name one; known here: billing, audit\n",
    )
    assert cli("peek", "orders", "-g", "x").err == "unibus: queue 'orders' has no groups; drop the group 'x'\n"
    assert cli("peek", "events", "-g", "bill").code == 1


def test_a_publish_to_nobody_is_said(cli: Cli) -> None:
    cli.toml(TOML)
    cli.ok("declare")
    assert "unibus: topic 'lonely' has no group: 1 message went to nobody\n" in cli.ok("publish", "lonely", "1").err


def test_the_wrong_verb(cli: Cli) -> None:
    cli.toml(TOML)
    cli.ok("declare")
    assert cli("send", "events", "1").err == "unibus: topic 'events': use `unibus publish`\n"
    assert cli("publish", "orders", "1").err == "unibus: queue 'orders': use `unibus send`\n"


def test_the_type_of_the_application_counts(cli: Cli) -> None:
    app = cli.app()
    cli.ok("declare", "--app", app)
    done = cli("send", "orders", '{"total": "x"}', "--app", app)
    assert done.code == 2
    assert done.err.startswith("unibus: queue 'orders': the body is not a valid Order: ")
    cli.ok("send", "orders", '{"id": "o-1"}', "--app", app)
    assert cli.ok("peek", "orders").lines[0]["body"] == {
        "id": "o-1",
        "total": 1,
    }  # its defaults, as the service sends it
    cli.ok("send", "names", "Ada", "--app", app)  # text as it is, where the queue is of text
    assert cli.ok("peek", "names").lines[0]["text"] == "Ada"
    done = cli("send", "orderz", "1", "--app", app)
    assert (done.code, done.err) == (1, "unibus: queue 'orderz' does not exist on the memory broker; declare it\n")


def test_a_body_that_is_no_json(cli: Cli) -> None:
    cli.toml(TOML)
    cli.ok("declare")
    done = cli("send", "orders", "hello")
    assert (done.code, done.err) == (2, "unibus: the body is not JSON (column 1); for text say --text\n")
    cli.ok("send", "orders", "hello", "--text")
    assert cli.ok("peek", "orders").lines[0]["text"] == "hello"
    assert cli("send", "orders", "1", "-H", "novalue").err == "unibus: --header novalue: write NAME=VALUE\n"


def test_tables_for_people(cli: Cli, terminal: Callable[[], None]) -> None:
    cli.toml(TOML)
    cli.ok("declare")
    terminal()
    assert cli.ok("send", "orders", '{"a": 1}', "-k", "c42").err == "1 message sent to queue 'orders'\n"
    done = cli.ok("peek", "orders")
    assert "c42" in done.out
    assert '{"a": 1}' in done.out
    done = cli.ok("receive", "orders", "--ack")
    assert '{"a": 1}' in done.out


def test_dead_letters_have_their_own_command(cli: Cli) -> None:
    assert (
        cli("peek", "orders.dlq").err == "unibus: orders.dlq holds failed messages of orders: unibus dlq list orders\n"
    )
    assert "unibus dlq list a.b --invalid" in cli("receive", "a.b.invalid").err


# channels


def test_channels(cli: Cli, terminal: Callable[[], None]) -> None:
    cli.toml(TOML)
    missing = cli.ok("channels", "--json").lines[0]["channels"]
    assert {row["exists"] for row in missing} == {False, None}
    assert "missing" in cli.ok("channels").out
    cli.ok("declare")
    cli.ok("send", "orders", "--bodies", text="1\n2\n")
    cli.ok("publish", "events", "1")
    rows = {(row["channel"], row["group"]): row for row in cli.ok("channels", "--json").lines[0]["channels"]}
    assert rows["orders", None]["ready"] == 2
    assert rows["orders", None].items() >= {"kind": "queue", "in_flight": 0, "exact": True, "dead_letters": 0}.items()
    assert rows["orders", None]["oldest"] >= 0
    assert rows["events", "audit"]["ready"] == rows["events", "billing"]["ready"] == 1
    assert rows["lonely", None]["exists"] is None
    terminal()
    table = cli.ok("channels").out
    assert "audit" in table
    assert "none" in table
    assert [row["channel"] for row in cli.ok("channels", "orders", "--json").lines[0]["channels"]] == ["orders"]


def test_channels_without_any(cli: Cli) -> None:
    done = cli("channels")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("unibus: no channels are known: ")


# What it works on


def test_without_a_url(cli: Cli) -> None:
    done = cli("channels", url=None)
    assert done.code == 2
    assert done.err.startswith("unibus: no url: set UNIBUS_URL, ")


def test_the_app_of_unibus_toml(cli: Cli) -> None:
    cli.toml(f'app = "{cli.app()}"')
    cli.ok("declare")
    cli.ok("publish", "order.charged", "x")
    cli.ok("peek", "order.charged")  # the group is the service's


def test_a_config_of_ones_own(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("[queues.other]\n", encoding="utf-8")
    assert cli.ok("declare", "--config", "other.toml").err == "3 objects made; 0 are there\n"
    done = cli("declare", "--config", "nowhere.toml")
    assert (done.code, done.err) == (2, "unibus: --config: there is no file 'nowhere.toml'\n")


@pytest.mark.parametrize(
    ("app", "says"),
    [
        ("shop", "app 'shop': write module:bus, as in shop.main:bus"),
        ("shop.py", "app 'shop.py': write module:bus, as in shop:bus"),
        ("a/shop.py:bus", "app 'a/shop.py:bus': write the module, not the file: a.shop:bus"),
        ("nowhere.shop:bus", "app 'nowhere.shop:bus': there is no module 'nowhere' here"),
        ("broken:bus", "app 'broken:bus' can't be imported: ZeroDivisionError: division by zero"),
        ("needy:bus", "app 'needy:bus' can't be imported: ModuleNotFoundError: No module named 'nosuchthing'"),
        ("unreadable:bus", "app 'unreadable:bus' can't be imported: SyntaxError: "),
        ("fine:buss", "app 'fine:buss': 'buss' is no Bus; did you mean fine:bus?"),
        ("empty:bus", "app 'empty:bus': 'bus' is no Bus; empty has no Bus"),
    ],
)
def test_an_app_that_is_not_there(cli: Cli, tmp_path: Path, app: str, says: str) -> None:
    for name, text in {
        "broken": "1 / 0",
        "needy": "import nosuchthing",
        "unreadable": "def",
        "fine": "import unibus\nbus = unibus.Bus()",
        "empty": "",
    }.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    done = cli("channels", "--app", app)
    assert done.code == 2
    assert done.err.startswith(f"unibus: {says}")
    assert len(done.err.splitlines()) == 1
    if app in {"broken:bus", "needy:bus"}:
        assert f"{app[:-4]}.py, line 1)" in done.err


def test_the_url_of_the_command_line_brings_its_own_user(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIBUS_USERNAME", "other")
    monkeypatch.setenv("UNIBUS_PASSWORD", "hunter2")
    done = cli("doctor", "--json", url="amqp://me:secret@127.0.0.1:1")
    found = {s["key"]: (s["value"], s["source"]) for s in done.lines[0]["settings"]}
    assert found["username"] == ("me", "--url")
    assert found["password"] == ("****", "--url")
    assert done.code == 3
    assert "secret" not in done.out + done.err
    assert "hunter2" not in done.out + done.err


# The whole


def test_without_typer_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins
    import sys

    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "typer":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]  # passed on

    for name in [name for name in sys.modules if name.startswith("unibus.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit, match=r"'typer', which is not installed; pip install 'unibus\[cli\]'"):
        main()


def test_an_interrupt_before_there_is_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line as later on, and no traceback of the imports."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unibus.cli.app.make", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "unibus: interrupted\n"


def test_version_help_and_usage(cli: Cli) -> None:
    assert cli("--version", url=None).out.startswith("unibus 0.")
    assert "channels" in cli("--help", url=None).out
    assert cli("peek", url=None).code == 2
    assert cli("nosuch", url=None).code == 2


def test_an_error_of_nobody_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_args: object) -> None:
        raise RuntimeError("what now")

    monkeypatch.setattr("unibus.cli.commands.channels.backlogs", broken)
    done = cli("channels", "orders", url=URL)
    assert done.code == 1
    assert done.err.startswith("unibus: RuntimeError: what now (")
