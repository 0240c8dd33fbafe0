"""Names of inboxes, and the check of an address that somebody else wants the reply to go to."""

from __future__ import annotations

import re

from unibus.channel import Inbox
from unibus.errors import Refused

PLAIN = "A-Za-z0-9._-"  # what every broker takes in a name, dots aside


def plain(text: str, *, dots: bool = True) -> str:
    """The text with `-` for all that may not stand in a name."""
    return re.sub(rf"[^{PLAIN if dots else 'A-Za-z0-9-'}]", "-", text)


def inbox_name(prefix: str, service: str, token: str, separator: str = ".") -> str:
    """The name of one process' inbox: `<prefix>unibus.reply.<service>.<token>`. The token is 16 hex digits."""
    return separator.join((f"{prefix}unibus", "reply", plain(service)[:100], token))


def inbox_shape(separator: str = ".") -> str:
    """The regular expression of the names that `inbox_name` makes, and of nothing else that is declared."""
    s = re.escape(separator)
    return rf"[{PLAIN}]{{0,60}}unibus{s}reply{s}[{PLAIN}]{{0,120}}{s}[0-9a-f]{{16}}"


def check_inbox(shape: re.Pattern[str], text: str, expected: str) -> re.Match[str]:
    """An untrusted reply_to that has the shape of an inbox' name. Raises Refused, which says what was `expected`."""
    found = shape.fullmatch(text)
    if found is None:
        raise Refused(f"the reply address is no inbox that unibus has made: expected {expected}")
    return found


def inbox(shape: re.Pattern[str], text: str, expected: str) -> Inbox:
    """The inbox behind an untrusted reply_to, by the rule of `check_inbox`."""
    check_inbox(shape, text, expected)
    return Inbox(text)
