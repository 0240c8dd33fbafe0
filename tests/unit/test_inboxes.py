"""Names of inboxes: what is made is recognised, and nothing else is."""

from __future__ import annotations

import re

import pytest

from unibus.channel import Inbox
from unibus.errors import Refused
from unibus.inboxes import check_inbox, inbox, inbox_name, inbox_shape, plain

TOKEN = "0123456789abcdef"


def test_what_may_not_stand_in_a_name_is_a_dash() -> None:
    assert plain("Billing/eu_1.x ü") == "Billing-eu_1.x--"
    assert plain("a.b_c", dots=False) == "a-b-c"


@pytest.mark.parametrize("separator", [".", ":"])
def test_what_is_made_is_recognised(separator: str) -> None:
    name = inbox_name("staging.", "billing/ü" * 40, TOKEN, separator)
    assert name.startswith(f"staging.unibus{separator}reply{separator}billing--")
    assert inbox(re.compile(inbox_shape(separator)), name, "") == Inbox(name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "orders",
        "unibus.reply.s.",
        f"unibus.reply.s.{TOKEN}0",
        f"unibusXreplyXsX{TOKEN}",
        f"unibus.reply.s.{TOKEN}\n",
    ],
)
def test_nothing_else_is(text: str) -> None:
    with pytest.raises(Refused, match="expected this shape"):
        check_inbox(re.compile(inbox_shape()), text, "this shape")
