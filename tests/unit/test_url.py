"""The URL parser: each part, each error, and no password in any text."""

from __future__ import annotations

import traceback
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unibus.adapter import Secret, Url
from unibus.errors import ConfigError
from unibus.url import Query, is_secret, masked, parse

SECRET = Secret("p@ss")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("memory://", Url("memory")),
        ("memory://name", Url("memory", (("name", None),))),
        ("AMQP://h", Url("amqp", (("h", None),))),
        (" redis://h/0\n", Url("redis", (("h", None),), "0")),
        (
            "amqp://u:p%40ss@h1:5672,h2/vhost?heartbeat=30",
            Url("amqp", (("h1", 5672), ("h2", None)), "vhost", "u", SECRET, {"heartbeat": "30"}),
        ),
        ("amqp://h/%2F", Url("amqp", (("h", None),), "/")),
        ("amqp://h/", Url("amqp", (("h", None),))),
        ("amqp://u@h", Url("amqp", (("h", None),), username="u")),
        ("redis://:p%40ss@h", Url("redis", (("h", None),), password=SECRET)),
        ("amqp://u:@h", Url("amqp", (("h", None),), username="u", password=Secret(""))),
        ("amqp://u:a:b@h", Url("amqp", (("h", None),), username="u", password=Secret("a:b"))),
        ("amqp://[::1]:5672,[fe80::1%25eth0]", Url("amqp", (("::1", 5672), ("fe80::1%eth0", None)))),
        (
            "sqs://eu-west-1?endpoint_url=http://127.0.0.1:4566",
            Url("sqs", (("eu-west-1", None),), query={"endpoint_url": "http://127.0.0.1:4566"}),
        ),
        ("kafka://h?a=b%3Dc&d=x+y&e=", Url("kafka", (("h", None),), query={"a": "b=c", "d": "x+y", "e": ""})),
        ("memory://?profile=sqs", Url("memory", query={"profile": "sqs"})),
    ],
)
def test_parts(text: str, expected: Url) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "scheme"),
        ("h:5672", "scheme"),
        ("amqp:h", "scheme"),
        ("://h", "scheme"),
        ("am qp://h", "scheme"),
        ("amqp://u:hunter2@", "no host"),
        ("amqp://@h", "user"),
        ("amqp://u:hunter2@h1,u:hunter2@h2", "several @"),
        ("amqp://u:hun@ter2@h", "several @"),
        ("amqp://u:hun/ter2@h", "behind the first /"),
        ("amqp://u:hun#ter2@h", "#"),
        ("amqp://u:hun ter2@h", "space"),
        ("amqp://u:hun?ter2@h", "port of host 1"),
        ("amqp://u:12?ter2@h", "query"),
        ("amqp://u:hunter2%zz@h", "password has a %"),
        ("amqp://u:hunter2%@h", "password has a %"),
        ("amqp://u:hunter2%ff@h", "password is not UTF-8"),
        ("amqp://u%zz:hunter2@h", "user has a %"),
        ("amqp://h1,,h2", "host 2 is empty"),
        ("amqp://h1,", "host 2 is empty"),
        ("amqp://:5672", "host 1 is empty"),
        ("amqp://h:", "port of host 1"),
        ("amqp://h:0", "port of host 1"),
        ("amqp://h:65536", "port of host 1"),
        ("amqp://h:١", "port of host 1"),
        ("amqp://h,g:x", "port of host 2"),
        ("amqp://::1", "brackets"),
        ("amqp://[::1", "IPv6"),
        ("amqp://[::1]5672", "IPv6"),
        ("amqp://[h]", "not an IPv6 address"),
        ("amqp://h!", "host 1 has a character"),
        ("amqp://h/%zz", "path"),
        ("amqp://h?a", "part 1 of the query"),
        ("amqp://h?a=1&", "part 2 of the query"),
        ("amqp://h?a=1&=2", "part 2 of the query"),
        ("amqp://h?a=1&a=2", "twice"),
        ("amqp://h?a=%zz", "query value 1"),
    ],
)
def test_errors_name_the_part_and_no_password(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert part in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in shown
    assert "ter2" not in shown
    assert caught.value.__context__ is None


def test_nothing_that_prints_a_url_shows_its_password() -> None:
    url = parse("amqp://u:p%40ss@h/v?ssl_password=p%40ss&heartbeat=30&proxy=http://u:p@ss@h")
    for shown in (repr(url), str(url), f"{url}", repr(url.query), str(url.query)):
        assert "p@ss" not in shown
        assert "p%40ss" not in shown
    assert "heartbeat" in repr(url)
    assert url.query == {"ssl_password": "p@ss", "heartbeat": "30", "proxy": "http://u:p@ss@h"}


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("password", True),
        ("ssl-keyfile-password", True),
        ("aws_secret_access_key", True),
        ("session_token", True),
        ("passphrase", True),
        ("api_key", True),
        ("kms_key", False),
        ("heartbeat", False),
    ],
)
def test_what_counts_as_a_secret(key: str, secret: bool) -> None:
    assert is_secret(key) is secret
    assert (masked(key, "x") == "****") is secret


def test_masked_looks_inside() -> None:
    value = {"a": [{"token": "t"}, "http://u:p@h/x"], "b": 1}
    assert masked("x", value) == {"a": [{"token": "****"}, "http://****@h/x"], "b": 1}
    assert masked("", Query(a="1")) == {"a": "1"}


# Everything printable may stand in a user, a password, a path and a query once it is percent-encoded.
TEXT = st.text(max_size=20).filter(lambda s: not any(0xD800 <= ord(c) <= 0xDFFF for c in s))
PORT = st.none() | st.integers(1, 65535)
HOST = st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True)
IPV6 = st.ip_addresses(v=6).map(str)
HOSTS = st.lists(st.tuples(HOST | IPV6, PORT), min_size=1, max_size=4)


@st.composite
def urls(draw: st.DrawFn) -> tuple[str, Url]:
    """A URL's text and its parts."""
    hosts = draw(HOSTS)
    password = draw(st.none() | TEXT)
    username = draw(TEXT.filter(bool)) if password is not None else draw(st.none() | TEXT.filter(bool))
    path = draw(TEXT)
    query = draw(st.dictionaries(TEXT.filter(bool), TEXT, max_size=4))

    def escaped(text: str) -> str:
        return quote(text, safe="")

    text = "amqp://"
    if username is not None:
        text += escaped(username) + (f":{escaped(password)}" if password is not None else "") + "@"
    text += ",".join((f"[{h}]" if ":" in h else h) + (f":{p}" if p else "") for h, p in hosts)
    text += f"/{escaped(path)}" if path else ""
    text += "?" + "&".join(f"{escaped(k)}={escaped(v)}" for k, v in query.items()) if query else ""
    secret = Secret(password) if password is not None else None
    return text, Url("amqp", tuple(hosts), path, username, secret, query)


@given(urls())
def test_what_is_encoded_comes_back(case: tuple[str, Url]) -> None:
    text, url = case
    assert parse(text) == url


def attempt(text: str) -> Url | ConfigError:
    try:
        return parse(text)
    except ConfigError as exc:
        return exc


@given(st.text(max_size=40).map(lambda s: f"amqp://{s}") | st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    found = attempt(text)
    assert str(found).startswith("url: ") or isinstance(found, Url)


@given(urls(), st.integers(0, 200), st.text(alphabet="@/?#:[]%, ", max_size=3))
def test_a_broken_url_does_not_give_its_password_away(case: tuple[str, Url], cut: int, noise: str) -> None:
    text = case[0].replace("amqp://", f"amqp://u:hunter2{noise}hunter2", 1)
    found = attempt(text[: 24 + cut])
    if isinstance(found, ConfigError):
        assert "hunter2" not in str(found)
    else:
        assert "hunter2" not in repr(found.password)
