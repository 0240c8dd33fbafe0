"""Bodies on the wire: what each kind of type becomes, what is refused, and that no error shows a value."""

import json
import subprocess
import sys
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, RootModel, field_validator
from typing_extensions import TypedDict

from unibus.channel import Queue, Topic
from unibus.codec import codec_for, codec_of, type_name
from unibus.errors import CodecError, ConfigError

SECRET = "4111-SECRET"


class Order(BaseModel):
    id: str
    total: int = 0


class BigOrder(Order):
    note: str = ""


class Renamed(BaseModel):
    order_id: str = Field(alias="orderId")


class Paid(BaseModel):
    kind: Literal["paid"] = "paid"
    amount: int = 0


class Failed(BaseModel):
    kind: Literal["failed"] = "failed"
    why: str = ""


class Numbers(RootModel[list[int]]):
    pass


class Checked(BaseModel):
    card: str

    @field_validator("card")
    @classmethod
    def plausible(cls, card: str) -> str:
        if card == "bug":
            raise KeyError(SECRET)
        if not card.isdigit():
            raise ValueError(f"bad card {card}")
        return card


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: int = 0


class Row(TypedDict):
    id: int


Event = Annotated[Paid | Failed, Field(discriminator="kind")]


class Reversed:
    """A codec of a user's own, with bugs on request."""

    content_type = "application/x-reversed"

    def encode(self, body: Any) -> Any:
        return body if body == "not bytes" else body[::-1].encode()

    def decode(self, data: bytes) -> Any:
        if data == b"bug":
            raise KeyError(SECRET)
        return data.decode()[::-1]


def no_secret(error: BaseException) -> str:
    """The text of an error, after checking that no part of its report holds the secret."""
    assert error.__cause__ is None
    assert error.__context__ is None
    assert SECRET not in "".join(traceback.format_exception(error))
    return str(error)


@pytest.mark.parametrize(
    ("type_", "body", "wire"),
    [
        (bytes, b"\x00\xff", b"\x00\xff"),
        (str, "grüße", "grüße".encode()),
        (Order, Order(id="a", total=2), b'{"id":"a","total":2}'),
        (Renamed, Renamed(orderId="a"), b'{"orderId":"a"}'),
        (Numbers, Numbers([1, 2]), b"[1,2]"),
        (Point, Point(1, 2), b'{"x":1,"y":2}'),
        (Row, {"id": 1}, b'{"id":1}'),
        (Event, Failed(why="w"), b'{"kind":"failed","why":"w"}'),
        (Paid | Failed, Paid(amount=1), b'{"kind":"paid","amount":1}'),
        (list[Order], [Order(id="a")], b'[{"id":"a","total":0}]'),
        (dict[str, int], {"a": 1}, b'{"a":1}'),
        (dict, {"a": [None, 1.5]}, b'{"a":[null,1.5]}'),
        (Any, {"a": [None, 1.5]}, b'{"a":[null,1.5]}'),
        (object, "x", b'"x"'),
        (int, 5, b"5"),
        (None, None, b"null"),
        (UUID, UUID(int=1), b'"00000000-0000-0000-0000-000000000001"'),
        (datetime, datetime(2024, 1, 1, tzinfo=UTC), b'"2024-01-01T00:00:00Z"'),
        (Colour, Colour.RED, b'"red"'),
        (Annotated[int, Field(ge=0)], 3, b"3"),
    ],
    ids=str,
)
def test_a_body_comes_back_as_it_was(type_: Any, body: Any, wire: bytes) -> None:
    codec = codec_of(type_)
    assert codec.encode(body) == wire
    again = codec.decode(wire)
    assert again == body
    assert type(again) is type(body)


@pytest.mark.parametrize(
    ("type_", "content_type"),
    [(bytes, "application/octet-stream"), (str, "text/plain; charset=utf-8"), (Order, "application/json")],
)
def test_content_type_follows_the_type(type_: Any, content_type: str) -> None:
    assert codec_of(type_).content_type == content_type


def test_bytes_are_not_copied() -> None:
    body = b"x" * 100
    codec = codec_for(Queue("q"))
    assert codec.encode(body) is body
    assert codec.decode(body) is body


@pytest.mark.parametrize("view", [bytearray, memoryview])
def test_a_buffer_is_copied_at_once(view: Any) -> None:
    encoded = codec_for(Queue("q")).encode(view(b"abc"))
    assert encoded == b"abc"
    assert type(encoded) is bytes


@pytest.mark.parametrize(
    ("channel", "body", "said"),
    [
        (Queue("q"), "text", "queue 'q' takes bytes, not str"),
        (Queue("q", str), b"bytes", "queue 'q' takes str, not bytes"),
        (Queue("q", Order), {"id": SECRET}, "queue 'q' takes Order, not dict"),
        (Topic("t", Order), Paid(), "topic 't' takes Order, not Paid"),
        (Queue("q", Order), None, "queue 'q' takes Order, not NoneType"),
        (Queue("q", Event), {"kind": "paid"}, "queue 'q' takes Paid | Failed, not dict"),
        (Queue("q", Paid | Failed), Order(id=SECRET), "queue 'q' takes Paid | Failed, not Order"),
        (Queue("q", list[Order]), Order(id=SECRET), "queue 'q' takes list[Order], not Order"),
        (Queue("q", Point), {"x": 1}, "queue 'q' takes Point, not dict"),
        (Queue("q", int), SECRET, "queue 'q' takes int, not str"),
        (
            Queue("q", list[Order]),
            [{"id": SECRET}],
            "a list can't be encoded as JSON: a part of it is not of the declared",
        ),
        (Queue("q", Point), Point(SECRET), "field 'x' does not hold what it declares"),  # type: ignore[arg-type]  # the point
        (Queue("q", Any), object(), "Unable to serialize unknown type"),
        (Queue("q", str), "\ud800" + SECRET, "lone surrogate at character 0"),
        (Queue("q", Order, codec=Reversed()), SECRET, "queue 'q' takes Order, not str"),
        (Queue("q", codec=Reversed()), "not bytes", "Reversed: encode returned str, not bytes"),
        (Queue("q", codec=Reversed()), 5, "Reversed: TypeError in Reversed.encode, line"),
    ],
)
def test_a_wrong_body_is_refused_by_name(channel: Any, body: Any, said: str) -> None:
    with pytest.raises(CodecError) as caught:
        codec_for(channel).encode(body)
    assert said in no_secret(caught.value)


def test_circular_body_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CodecError, match="can't be encoded"):
        codec_of(Any).encode(loop)


def test_a_subclass_is_sent_as_the_type_of_the_channel() -> None:
    assert json.loads(codec_of(Order).encode(BigOrder(id="a", note="n"))) == {"id": "a", "total": 0}


@pytest.mark.parametrize(
    ("type_", "data", "said"),
    [
        (Order, b"", "the body is empty"),
        (Order, b'{"id":', "json_invalid at line 1 column 6"),
        (Order, b'"' + SECRET.encode() + b'\xff"', "json_invalid at line 1"),
        (Order, b"{}", "id: missing"),
        (Order, b'{"id":"a","total":"4111-SECRET"}', "total: int_parsing"),
        (Order, b'["4111-SECRET"]', "is not a valid Order: model_type"),
        (list[Order], b'[{"id":"a"},{"total":"4111-SECRET"}]', "1.id: missing; 1.total: int_parsing"),
        (dict[str, int], b'{"4111-SECRET":"x"}', "*: int_parsing"),
        (list[int], b'["a","b","c","d","4111-SECRET"]', "2: int_parsing; and 2 more"),
        (Event, b'{"kind":"4111-SECRET"}', "union_tag_invalid"),
        (Checked, b'{"card":"4111-SECRET"}', "card: value_error"),
        (Checked, b'{"card":"bug"}', "KeyError in Checked.plausible, line"),
        (str, b"\xff4111-SECRET", "not UTF-8 (byte 0)"),
    ],
)
def test_a_broken_body_names_place_and_kind_but_no_value(type_: Any, data: bytes, said: str) -> None:
    with pytest.raises(CodecError) as caught:
        codec_for(Queue("orders", type_)).decode(data)
    text = no_secret(caught.value)
    assert said in text
    assert text.startswith("queue 'orders'")


def test_a_broken_codec_of_the_user_names_the_place_only() -> None:
    with pytest.raises(CodecError) as caught:
        codec_for(Queue("q", codec=Reversed())).decode(b"bug")
    assert "queue 'q': Reversed: KeyError in Reversed.decode, line" in no_secret(caught.value)


@pytest.mark.parametrize(
    ("type_", "content_type", "legal"),
    [
        (bytes, "image/png", True),
        (bytes, "text/plain; charset=latin-1", True),
        (str, "application/xml", True),
        (str, "text/html; charset=UTF-8", True),
        (str, "text/plain; charset=iso-8859-1", False),
        (Order, None, True),
        (Order, "", True),
        (Order, "application/json", True),
        (Order, "Application/JSON; charset=UTF-8", True),
        (Order, 'application/json; version=1; charset="us-ascii"', True),
        (Order, "text/json", True),
        (Order, "application/vnd.shop.order+json", True),
        (Order, "application/json; charset=utf-16", False),
        (Order, "application/xml", False),
        (Order, "application/octet-stream", False),
        (Order, "+json", False),
        (Order, "json\r\nx" * 100, False),
    ],
)
def test_content_types_of_foreign_producers(type_: Any, content_type: str | None, legal: bool) -> None:
    codec = codec_of(type_)
    data = b'{"id":"a"}'
    for _ in range(2):  # the second look is answered from memory
        if legal:
            codec.decode(data, content_type)
            continue
        with pytest.raises(CodecError, match=r"content type|charset") as caught:
            codec.decode(data, content_type)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("content_type", "legal"),
    [
        (None, True),
        ("application/x-reversed", True),
        ("application/x-reversed; v=2; charset=latin-1", True),
        ("application/octet-stream", True),
        ("application/json", False),
    ],
)
def test_a_codec_of_the_user_gets_its_own_format_only(content_type: str | None, legal: bool) -> None:
    codec = codec_for(Queue("q", codec=Reversed()))
    assert codec.encode("abc") == b"cba"
    if legal:
        assert codec.decode(b"cba", content_type) == "abc"
    else:
        with pytest.raises(CodecError, match=r"queue 'q': content type 'application/json'; it takes application/x-rev"):
            codec.decode(b"cba", content_type)


def test_made_once_per_channel_object_and_not_per_name() -> None:
    one: Queue[Any] = Queue("q", Order)
    other: Queue[Any] = Queue("q", str)
    assert codec_for(one) is codec_for(one)
    assert codec_for(one) is not codec_for(other)
    assert codec_for(other).encode("x") == b"x"


def test_the_cache_is_bounded() -> None:
    for n in range(3000):
        codec_for(Queue.derived(f"q{n}"))
    from unibus import codec  # looks inside

    assert len(codec._channels) <= codec._CACHED


class Plain:
    pass


@pytest.mark.parametrize("type_", [Plain, "Order", list["Nowhere"]])  # type: ignore[name-defined]  # noqa: F821  # unresolvable on purpose
def test_a_type_without_a_json_form_is_a_config_error(type_: Any) -> None:
    with pytest.raises(ConfigError, match=r"queue 'q': .*has no JSON form.*give the channel a codec"):
        codec_for(Queue("q", type_))


@pytest.mark.parametrize(
    ("type_", "name"),
    [
        (Order, "Order"),
        (list[Order], "list[Order]"),
        (Event, "Paid | Failed"),
        (dict[str, Order | None], "dict[str, Order | None]"),
        (Any, "Any"),
        (None, "None"),
        (Literal["a"], "Literal['a']"),
    ],
)
def test_type_names_read_as_written(type_: Any, name: str) -> None:
    assert type_name(type_) == name


def test_pydantic_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys; from unibus.codec import codec_for; from unibus.channel import Queue; "
        "codec_for(Queue('a')).encode(b''); codec_for(Queue('b', str)).encode(''); assert 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # our own interpreter and code


@given(st.binary(max_size=60), st.sampled_from([str, Order, list[int], dict[str, int], Event, Point]))
def test_any_bytes_are_a_body_or_a_codec_error(data: bytes, type_: Any) -> None:
    try:
        codec_of(type_).decode(data)
    except CodecError as error:
        assert str(error).isprintable()  # noqa: PT017  # both outcomes are legal


@given(st.text() | st.binary())
def test_text_and_bytes_come_back(body: str | bytes) -> None:
    codec = codec_of(type(body))
    try:
        assert codec.decode(codec.encode(body)) == body
    except CodecError as error:
        assert "surrogate" in str(error)  # noqa: PT017  # both outcomes are legal
