"""The URL of a broker: one parser for all, because `urllib` knows one host and prints what it can't read.

    scheme://user:password@host:port,host:port/path?key=value&key=value

Everything but the scheme may be missing. User, password, path and query are percent-decoded; a `+` is a plus. An error
names the part at fault and never quotes the text: what looks like a host may be half of a password.
"""

from __future__ import annotations

import re
from ipaddress import IPv6Address
from urllib.parse import unquote

from unibus.adapter import Secret, Url
from unibus.errors import ConfigError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_HOST = re.compile(r"[\w.~-]+")
_PORT = re.compile(r"[0-9]{1,5}")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SECRET = re.compile(r"pass|secret|token|credential|private|(api|access|account|shared)_?key", re.IGNORECASE)
MASK = "****"


def is_secret(key: str) -> bool:
    """Whether a setting of this name is likely to hold a credential."""
    return bool(_SECRET.search(key.replace("-", "_")))


def masked(key: str, value: object) -> object:
    """`value` for people: without what its name, or a URL inside it, gives away as a credential."""
    if is_secret(key):
        return MASK
    if isinstance(value, str):
        return re.sub(r"(://)[^/?#\s]*@", rf"\1{MASK}@", value)
    if isinstance(value, dict):
        return {k: masked(str(k), v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [masked(key, v) for v in value]
    return value


class Query(dict[str, str]):
    """The driver settings of a URL. Prints like a dict, credentials masked."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(masked("", dict(self)))


def parse(text: str) -> Url:
    """The parts of a broker URL. Raises ConfigError."""
    scheme, separator, rest = text.strip().partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        raise ConfigError("url: there is no scheme; write scheme://..., such as amqp://host or memory://")
    if any(c.isspace() or not c.isprintable() for c in rest):
        raise ConfigError("url: there is a space or a control character in it; write it percent-encoded (%20)")
    if "#" in rest:
        raise ConfigError("url: there is a # in it; in a user, password or path it is written %23")
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    if "@" in path:
        raise ConfigError("url: there is an @ behind the first /; a / in user or password is written %2F, an @ %40")
    userinfo, at, hosts = authority.rpartition("@")
    if "@" in userinfo:
        raise ConfigError("url: there are several @; in user or password it is written %40, and they stand once")
    username, colon, password = userinfo.partition(":")
    if at and not userinfo:
        raise ConfigError("url: the user before the @ is empty")
    return Url(
        scheme=scheme.lower(),
        hosts=_hosts(hosts, at),
        path=_decode(path, "path"),
        username=_decode(username, "user") or None,
        password=Secret(_decode(password, "password")) if colon else None,
        query=_query(query),
    )


def _decode(text: str, part: str) -> str:
    if "%" not in text:
        return text
    if _BAD_ESCAPE.search(text):
        raise ConfigError(f"url: the {part} has a % without two hex digits; a % itself is written %25")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        pass  # raised below: its context would hold the text
    raise ConfigError(f"url: the {part} is not UTF-8 once percent-decoded")


def _hosts(text: str, at: str) -> tuple[tuple[str, int | None], ...]:
    if not text:
        if at:
            raise ConfigError("url: there is a user but no host")
        return ()
    return tuple(_host(item, f"host {n}") for n, item in enumerate(text.split(","), 1))


def _host(text: str, part: str) -> tuple[str, int | None]:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ConfigError(f"url: {part}: write an IPv6 address as [::1] or [::1]:5672")
        host = _decode(host, part)  # %25eth0, a zone
        return _ipv6(host, part), _port(rest[1:], part) if rest else None
    host, colon, port = text.partition(":")
    if ":" in port:
        raise ConfigError(f"url: {part} has several colons; an IPv6 address stands in brackets, as [::1]:5672")
    if not host:
        raise ConfigError(f"url: {part} is empty")
    if not _HOST.fullmatch(host):
        raise ConfigError(
            f"url: {part} has a character that no host name has; in a user or password, percent-encode it"
        )
    return host, _port(port, part) if colon else None


def _ipv6(host: str, part: str) -> str:
    try:
        IPv6Address(host)
    except ValueError:
        pass  # raised below: its context would hold the text
    else:
        return host
    raise ConfigError(f"url: {part} is not an IPv6 address, though it stands in brackets")


def _port(text: str, part: str) -> int:
    if _PORT.fullmatch(text) and 1 <= int(text) <= 65535:
        return int(text)
    raise ConfigError(f"url: the port of {part} is not a number from 1 to 65535")


def _query(text: str) -> Query:
    query = Query()
    for n, item in enumerate(text.split("&") if text else (), 1):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"url: part {n} of the query is not key=value; a ? before it is written %3F")
        key = _decode(key, "query")
        if key in query:
            raise ConfigError(f"url: the query names part {n} twice; give each setting once")
        query[key] = _decode(value, f"query value {n}")
    return query
