"""From a user's function to a call, and every mistake that is found at start."""

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import pytest
from pydantic import BaseModel

from unibus.adapter import Source
from unibus.channel import Queue, Topic
from unibus.delivery import Delivery
from unibus.errors import CodecError, ConfigError
from unibus.handlers import Handler, Header, InvalidHeader, resolve
from unibus.message import Message
from unibus.typefit import fits

T = TypeVar("T")


class Order(BaseModel):
    id: str = ""


class BigOrder(Order):
    pass


class Price(BaseModel):
    amount: int = 0


class Level(Enum):
    LOW = "low"


class Codec:
    content_type = "x/y"

    def encode(self, body: Any) -> bytes:
        return bytes(body)

    def decode(self, data: bytes) -> Any:
        return data


ORDERS: Queue[Order] = Queue("orders", Order)
CHARGED: Topic[Order] = Topic("charged", Order)
QUOTES: Queue[Order] = Queue("quotes", Order, reply=Price)


def given(body: Any = "the body", **headers: str) -> Delivery[Any]:
    delivery: Delivery[Any] = Delivery(Message(b"", headers=headers), Source(ORDERS), None)
    delivery.body = body
    return delivery


def consumer(func: Any, channel: Any = ORDERS, batch: int = 0) -> Handler:
    return resolve(func, kind="consumer", channel=channel, batch=batch)


async def run(handler: Handler, delivery: Any) -> object:
    result = handler.call(delivery)
    return await result if handler.is_async else result


seen: list[Any] = []


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    seen.clear()


async def only_body(order: Order) -> None:
    seen.append(order)


async def bare(order):  # type: ignore[no-untyped-def]  # a handler without annotations is legal  # noqa: ANN001, ANN201
    seen.append(order)


def plain(order: Order) -> None:
    seen.append(order)


async def with_delivery(order: Order, delivery: Delivery[Order]) -> None:
    seen.append((order, delivery))


async def with_all(
    order: Order, tenant: Annotated[str, Header("tenant")], message: Message, *, delivery: Delivery[Any]
) -> None:
    seen.append((order, tenant, message, delivery))


class Service:
    async def method(self, order: Order, delivery: Delivery[Order]) -> None:
        seen.append((order, delivery))

    async def __call__(self, order: Order) -> None:
        seen.append(order)

    @staticmethod
    async def static(order: Order) -> None:
        seen.append(order)

    @classmethod
    async def of_class(cls, order: Order) -> None:
        seen.append(order)


async def with_resource(order: Order, db: str, delivery: Delivery[Order]) -> None:
    seen.append((order, db, delivery))


async def resource_first(db: str, order: Order) -> None:
    seen.append((db, order))


def transparent(func: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    return wrapper


def opaque(func: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    ("func", "name", "is_async"),
    [
        (only_body, "only_body", True),
        (bare, "bare", True),
        (plain, "plain", False),
        (Service(), "Service", True),
        (Service.static, "Service.static", True),
        (Service.of_class, "Service.of_class", True),
        (functools.partial(only_body), "only_body", True),
        (transparent(only_body), "only_body", True),
        (transparent(plain), "plain", False),
        (functools.lru_cache(plain), "plain", False),
    ],
)
async def test_the_body_alone(func: Any, name: str, is_async: bool) -> None:
    handler = consumer(func)
    await run(handler, given())
    assert seen == ["the body"]
    assert handler.is_async is is_async
    assert handler.name == f"{__name__}.{name}"


async def test_the_common_handler_has_no_layer_of_its_own() -> None:
    coroutine = consumer(only_body).call(given())
    assert inspect.iscoroutine(coroutine)
    assert coroutine.cr_code is only_body.__code__
    await coroutine


@pytest.mark.parametrize("func", [with_delivery, Service().method, transparent(with_delivery)])
async def test_body_and_delivery(func: Any) -> None:
    delivery = given()
    await run(consumer(func), delivery)
    assert seen == [("the body", delivery)]


async def test_every_kind_of_parameter() -> None:
    delivery = given(tenant="t1")
    handler = consumer(with_all)
    assert handler.headers == ("tenant",)
    await run(handler, delivery)
    assert seen == [("the body", "t1", delivery.message, delivery)]


async def test_partials_bind_what_is_theirs() -> None:
    delivery = given()
    await run(consumer(functools.partial(with_resource, db="the db")), delivery)
    await run(consumer(functools.partial(resource_first, "the db")), delivery)
    nested = functools.partial(functools.partial(with_resource, db="other"), db="the db")
    await run(consumer(nested), delivery)
    assert seen == [("the body", "the db", delivery), ("the db", "the body"), ("the body", "the db", delivery)]


async def test_batches() -> None:
    async def many(orders: list[Order], deliveries: list[Delivery[Order]], messages: Sequence[Message]) -> None:
        seen.append((orders, deliveries, messages))

    handler = consumer(many, batch=100)
    assert handler.batch == 100
    deliveries = [given("a"), given("b")]
    await run(handler, deliveries)
    assert seen == [(["a", "b"], deliveries, [d.message for d in deliveries])]


async def test_a_responder_returns_its_answer() -> None:
    async def quote(order: Order) -> Price:
        return Price(amount=5)

    handler = resolve(quote, kind="responder", channel=QUOTES)
    assert await run(handler, given()) == Price(amount=5)


def test_a_plain_function_that_returns_a_coroutine_is_an_error_not_a_lost_message() -> None:
    handler = consumer(lambda order: only_body(order))  # noqa: PLW0108  # the lambda hides that it is async
    assert not handler.is_async
    with pytest.raises(TypeError, match="returned an awaitable; make it async def"):
        handler.call(given())


async def test_a_plain_function_may_announce_its_coroutine() -> None:
    def forward(order: Order) -> Awaitable[None]:
        return only_body(order)

    handler = consumer(forward)
    assert handler.is_async
    await run(handler, given())
    assert seen == ["the body"]


@pytest.mark.parametrize(
    ("type_", "text", "value"),
    [
        (str, "5", "5"),
        (Any, "5", "5"),
        (int, "5", 5),
        (float, "1.5", 1.5),
        (bool, "true", True),
        (int | None, "5", 5),
        (Literal["a", "b"], "b", "b"),
        (Level, "low", Level.LOW),
        (datetime, "2024-01-01T00:00:00Z", datetime(2024, 1, 1, tzinfo=UTC)),
    ],
)
async def test_headers_become_their_type(type_: Any, text: str, value: Any) -> None:
    async def handle(body: Any, head: Annotated[type_, Header("h")]) -> None:
        seen.append(head)

    await run(consumer(handle), given(h=text))
    assert seen == [value]
    assert type(seen[0]) is type(value)


async def test_a_missing_header_is_the_default() -> None:
    async def handle(body: Any, head: Annotated[int | None, Header("h")] = None) -> None:
        seen.append(head)

    handler = consumer(handle)
    await run(handler, given())
    await run(handler, given(h="1"))
    assert seen == [None, 1]


@pytest.mark.parametrize("func_is_async", [True, False])
def test_a_missing_or_malformed_header_is_found_before_the_function_runs(func_is_async: bool) -> None:
    async def later(body: Any, head: Annotated[int, Header("tenant")]) -> None:
        seen.append(head)

    def now(body: Any, head: Annotated[int, Header("tenant")]) -> None:
        seen.append(head)

    handler = consumer(later if func_is_async else now)
    with pytest.raises(InvalidHeader, match="header 'tenant' is missing"):
        handler.call(given())
    with pytest.raises(InvalidHeader, match="header 'tenant' is no int: int_parsing") as caught:
        handler.call(given(tenant="SECRET"))
    assert "SECRET" not in repr(caught.value)
    assert caught.value.__context__ is None
    assert isinstance(caught.value, CodecError)
    assert not seen


def test_annotations_as_text() -> None:
    source = """
from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from typing import Annotated
    from unibus import Delivery, Header
async def handle(order: Order, delivery: Delivery[Order], tenant: Annotated[str, Header("t")] = "-") -> None:
    seen.append((order, tenant))
async def lost(order: Nowhere) -> None: ...
"""
    scope: dict[str, Any] = {"__name__": "shop.orders", "seen": seen}
    exec(source, scope)  # noqa: S102  # a module that imports for the type checker only
    assert consumer(scope["handle"]).name == "shop.orders.handle"
    with pytest.raises(
        ConfigError, match=r"consumer shop.orders.lost of queue 'orders': .*'Nowhere' is not defined.*at module level"
    ):
        consumer(scope["lost"])


async def no_parameters() -> None: ...
async def delivery_first(delivery: Delivery[Order], order: Order) -> None: ...
async def header_first(head: Annotated[str, Header("h")]) -> None: ...
async def keyword_body(*, order: Order) -> None: ...
async def star(order: Order, *rest: Any) -> None: ...
async def stars(order: Order, **rest: Any) -> None: ...
async def unknown(order: Order, db: str) -> None: ...
async def defaulted(order: Order, tenant: str = "-") -> None: ...
async def unannotated(order: Order, x) -> None: ...  # type: ignore[no-untyped-def]  # the mistake  # noqa: ANN001
async def wrong_body(order: Price) -> None: ...
async def narrow_body(order: BigOrder) -> None: ...
async def listed(orders: list[Order]) -> None: ...
async def wrong_delivery(order: Order, delivery: Delivery[Price]) -> None: ...
async def envelope(order: Order, head: Annotated[str, Header("x-correlation-id")]) -> None: ...
async def nameless(order: Order, head: Annotated[str, Header("")]) -> None: ...
async def odd_header(order: Order, head: Annotated[Service, Header("h")]) -> None: ...


async def returns(order: Order) -> Order:
    return order


def gives(order: Order) -> Iterator[None]:
    yield


async def gives_async(order: Order) -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize(
    ("func", "said"),
    [
        (no_parameters, "its first parameter has to take the body"),
        (keyword_body, "its first parameter has to take the body"),
        (delivery_first, r"parameter 'delivery': the first parameter is the body; Delivery\[Order\] comes after it"),
        (header_first, "parameter 'head': the first parameter is the body"),
        (star, r"parameter '\*rest': name each parameter"),
        (stars, r"parameter '\*\*rest': name each parameter"),
        (opaque(only_body), r"parameter '\*args': .*functools.wraps"),
        (unknown, r"parameter 'db' is a str, which unibus can't fill; use Delivery, Message or Annotated\[T, Header"),
        (defaulted, "parameter 'tenant' is a str, which unibus can't fill"),
        (unannotated, "parameter 'x' has no annotation"),
        (wrong_body, "parameter 'order' is a Price, but the body is Order"),
        (narrow_body, "parameter 'order' is a BigOrder, but the body is Order"),
        (listed, r"parameter 'orders' is a list\[Order\], but the body is Order; a list of messages needs batch=n"),
        (wrong_delivery, r"parameter 'delivery' is a Delivery\[Price\], but the body is Order"),
        (returns, "it returns Order, and nobody would get it: annotate `-> None`"),
        (gives, "can't be a generator"),
        (gives_async, "can't be a generator"),
        (transparent(gives_async), "can't be a generator"),
        (envelope, "header 'x-correlation-id' is a field of the envelope; take the Message"),
        (nameless, r"Header\(''\): use the name of a header"),
        (odd_header, "parameter 'head': a header can't be read as Service"),
        (Service, "a handler is a function, a method or an object with __call__"),
        (5, "a handler is a function"),
    ],
)
def test_a_mistake_is_found_at_start(func: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        consumer(func)
    assert str(caught.value).startswith("consumer ")
    assert "of queue 'orders'" in str(caught.value)


async def batch_of_one(order: Order) -> None: ...
async def batch_delivery(orders: list[Order], delivery: Delivery[Order]) -> None: ...
async def batch_header(orders: list[Order], head: Annotated[str, Header("h")]) -> None: ...
async def batch_deliveries_first(deliveries: list[Delivery[Order]]) -> None: ...
async def batch_wrong(orders: list[Price]) -> None: ...


@pytest.mark.parametrize(
    ("func", "said"),
    [
        (batch_of_one, r"is a Order, but the body is list\[Order\]; batch=10 hands over a list"),
        (batch_delivery, r"parameter 'delivery' is a Delivery\[Order\], .*use list\[Delivery\] or list\[Message\]"),
        (batch_header, r"parameter 'head' is a str, .*use list\[Delivery\] or list\[Message\]"),
        (batch_deliveries_first, "the first parameter is the body"),
        (batch_wrong, r"is a list\[Price\], but the body is list\[Order\]"),
    ],
)
def test_a_mistake_of_a_batch_handler(func: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        consumer(func, batch=10)


@pytest.mark.parametrize("batch", [-1, True])
def test_a_wrong_batch_size(batch: int) -> None:
    with pytest.raises(ConfigError, match="batch="):
        consumer(bare, batch=batch)


async def none_at_all(order: Order) -> None: ...
async def maybe(order: Order) -> Price | None: ...
async def untold(order: Order): ...  # type: ignore[no-untyped-def]  # legal  # noqa: ANN201
async def never(order: Order) -> NoReturn:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("func", "channel", "batch", "said"),
    [
        (returns, QUOTES, 0, "it returns Order, but the reply is Price"),
        (none_at_all, QUOTES, 0, "it returns None, but the reply is Price"),
        (maybe, QUOTES, 0, r"it returns Price \| None, but the reply is Price"),
        (untold, ORDERS, 0, r"it has no reply type; declare it as Queue\('orders', ..., reply=...\)"),
        (untold, QUOTES, 5, "a responder answers one request at a time"),
        (untold, CHARGED, 0, "a responder takes a Queue; use @bus.subscriber here"),
    ],
)
def test_a_mistake_of_a_responder(func: Any, channel: Any, batch: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(func, kind="responder", channel=channel, batch=batch)


@pytest.mark.parametrize("func", [untold, never])
def test_a_responder_may_leave_its_type_out(func: Any) -> None:
    assert resolve(func, kind="responder", channel=QUOTES).is_async


def test_queues_and_topics_are_not_confused() -> None:
    with pytest.raises(ConfigError, match=r"a consumer takes a Queue; use @bus.subscriber here"):
        consumer(only_body, CHARGED)
    with pytest.raises(ConfigError, match=r"a subscriber takes a Topic; use @bus.consumer here"):
        resolve(only_body, kind="subscriber", channel=ORDERS)
    assert resolve(only_body, kind="subscriber", channel=CHARGED).is_async


def test_a_codec_decides_what_bodies_are() -> None:
    assert consumer(only_body, Queue("q", codec=Codec())).is_async
    assert consumer(with_delivery, Queue("q", codec=Codec())).is_async
    with pytest.raises(ConfigError, match="but the body is Price"):
        consumer(only_body, Queue("q", Price, codec=Codec()))


@pytest.mark.parametrize(
    ("holder", "held", "answer"),
    [
        (Order, Order, True),
        (Order, BigOrder, True),
        (BigOrder, Order, False),
        (object, Order, True),
        (Any, Order, True),
        (Order, Any, True),
        (BaseModel, Order, True),
        (float, int, True),
        (int, float, False),
        (int, bool, True),
        (str, bytes, False),
        (None, type(None), True),
        (Order | Price, Order, True),
        (Order | Price, Price | Order, True),
        (Order, Order | Price, False),
        (Order | None, Order, True),
        (Order, Order | None, False),
        (Annotated[Order, "x"], Order, True),
        (Order, Annotated[Order | Price, "x"], False),
        (dict, dict[str, int], True),
        (dict[str, int], dict, True),
        (Mapping[str, Any], dict[str, int], True),
        (Mapping[str, str], dict[str, int], False),
        (list[int], list[int], True),
        (list[int], list[str], False),
        (Iterable[Order], list[BigOrder], True),
        (list[Any], list[str], True),
        (dict[str, int], list[str], False),
        (Literal["a"], str, True),
        (T, Order, True),
        (Callable[[], None], Order, False),
    ],
)
def test_only_a_certain_contradiction_counts(holder: Any, held: Any, answer: bool) -> None:
    assert fits(holder, held) is answer
