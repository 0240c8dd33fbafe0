"""From a user's function to a call: its parameters are read once, at start, and every mistake in them is found there."""

from __future__ import annotations

import collections.abc
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, Never, NoReturn, get_args, get_origin, get_type_hints

from unibus.channel import Queue, Topic
from unibus.codec import problems, type_name
from unibus.delivery import Delivery
from unibus.errors import CodecError, ConfigError
from unibus.message import ENVELOPE_HEADERS, Message
from unibus.typefit import fits, item_of

Kind = Literal["consumer", "subscriber", "responder"]

_MISSING: Any = inspect.Parameter.empty
_ALLOWED = "use Delivery, Message or Annotated[T, Header('name')]"
_PROVIDED = "or what the store of idempotency=... provides"
_ALLOWED_IN_BATCH = "use list[Delivery] or list[Message]"


@dataclass(frozen=True, slots=True)
class Header:
    """Marks a handler parameter that is a header: `tenant: Annotated[str, Header("tenant")]`.

    The text is turned into the annotated type. With a default the header may be missing; without, a message that lacks
    it goes to the invalid-message channel, and so does one whose header can't be turned into the type.
    """

    name: str


class InvalidHeader(CodecError):
    """A header that the handler asks for is missing or malformed: the message is invalid, the handler did not run."""


@dataclass(frozen=True, slots=True)
class Handler:
    """A handler, ready to be called with a delivery whose body is decoded (`batch`: with a list of them).

    `call` of an async handler returns its coroutine, of a plain one the result: to be run in a thread. It raises
    InvalidHeader before the function runs.
    """

    call: Callable[[Any], Any]
    is_async: bool
    name: str
    batch: int = 0
    headers: tuple[str, ...] = ()
    asks: frozenset[type] = frozenset()  # which of the provided types


Getter = Callable[[Any], Any]


def resolve(
    func: Callable[..., object],
    *,
    kind: Kind,
    channel: Queue[Any] | Topic[Any],
    batch: int = 0,
    provided: Mapping[type, Getter] = MappingProxyType({}),
) -> Handler:
    """Read the signature of a handler once. Raises ConfigError that names function, parameter and what is allowed.

    `provided`: what a parameter annotated with this type, or with a base of it, gets at each call.
    """
    target = _target(func)
    name = _name_of(func)
    where = f"{kind} {name} of {channel}"
    _check_kind(func, target, kind, channel, batch, where)
    hints = _hints(target, channel, where, provided)
    body, extras = _parameters(func, where)
    is_async = _check_return(hints.pop("return", _MISSING), kind, channel, where) or _is_async(target)
    _check_body(body, hints.get(body.name, _MISSING), channel, batch, where)
    headers: list[str] = []
    asks: set[type] = set()
    positional: list[Callable[[Any], Any]] = []
    keyword: list[tuple[str, Callable[[Any], Any]]] = []
    for parameter in extras:
        spot = f"{where}: parameter {parameter.name!r}"
        annotation = hints.get(parameter.name, _MISSING)
        header = _header_in(annotation)
        if header is not None and not batch:
            get = _header_getter(header, get_args(annotation)[0], parameter.default, spot)
            headers.append(header.name)
        elif (type_ := _provided_as(annotation, provided)) is not None:
            get = provided[type_]
            asks.add(type_)
        else:
            get = _getter(annotation, channel, batch, spot)
        if parameter.kind is parameter.KEYWORD_ONLY:
            keyword.append((parameter.name, get))
        else:
            positional.append(get)
    call = _compose(func, _body_list if batch else _body, positional, keyword)
    return Handler(
        call if is_async else _not_awaitable(call, where), is_async, name, batch, tuple(headers), frozenset(asks)
    )


# The call. `func(delivery.body)` is by far the most common one, and nothing is put between.


def _body(delivery: Delivery[Any]) -> Any:
    return delivery.body


def _body_list(deliveries: list[Delivery[Any]]) -> list[Any]:
    return [delivery.body for delivery in deliveries]


def _itself(given: Any) -> Any:
    return given


def _message(delivery: Delivery[Any]) -> Message:
    return delivery.message


def _message_list(deliveries: list[Delivery[Any]]) -> list[Message]:
    return [delivery.message for delivery in deliveries]


def _compose(
    func: Callable[..., Any],
    body: Callable[[Any], Any],
    positional: list[Callable[[Any], Any]],
    keyword: list[tuple[str, Callable[[Any], Any]]],
) -> Callable[[Any], Any]:
    if not keyword and body is _body:
        if not positional:
            return lambda delivery: func(delivery.body)
        if positional == [_itself]:
            return lambda delivery: func(delivery.body, delivery)
        if positional == [_message]:
            return lambda delivery: func(delivery.body, delivery.message)
    getters, named = tuple(positional), tuple(keyword)
    if not named:
        return lambda given: func(body(given), *[get(given) for get in getters])
    return lambda given: func(body(given), *[get(given) for get in getters], **{n: get(given) for n, get in named})


def _not_awaitable(call: Callable[[Any], Any], where: str) -> Callable[[Any], Any]:
    """A coroutine that nobody awaits would be a message acked and never handled."""

    def checked(given: Any) -> Any:
        result = call(given)
        if isinstance(result, Awaitable):
            if inspect.iscoroutine(result):
                result.close()
            raise TypeError(f"{where}: a plain function returned an awaitable; make it async def")
        return result

    return checked


def _header_getter(header: Header, type_: Any, default: Any, spot: str) -> Callable[[Delivery[Any]], Any]:
    name: Any = header.name  # unchecked so far
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{spot}: Header({name!r}): use the name of a header")
    if name in ENVELOPE_HEADERS:
        raise ConfigError(f"{spot}: header {name!r} is a field of the envelope; take the Message and read it there")
    parse = None if type_ in (str, Any, object) else _parser(type_, spot)

    def get(delivery: Delivery[Any]) -> Any:
        text = delivery.message.headers.get(name)
        if text is None:
            if default is _MISSING:
                raise InvalidHeader(f"header {name!r} is missing")
            return default
        return text if parse is None else parse(name, text)

    return get


def _parser(type_: Any, spot: str) -> Callable[[str, str], Any]:
    from pydantic import TypeAdapter, ValidationError  # only who asks for more than text pays for the import
    from pydantic.errors import PydanticUserError

    try:
        read: Callable[[Any], Any] = TypeAdapter(type_).validator.validate_strings
    except (PydanticUserError, NameError, TypeError) as error:
        raise ConfigError(
            f"{spot}: a header can't be read as {type_name(type_)}; use str, int, an enum, ..."
        ) from error

    def parse(name: str, text: str) -> Any:
        try:
            return read(text)
        except ValidationError as error:
            problem = problems(error)
        raise InvalidHeader(f"header {name!r} is no {type_name(type_)}: {problem}")  # without the value

    return parse


# The checks


def _target(func: Any) -> Any:
    """The function whose annotations count: inside partials, or the `__call__` of an object."""
    while isinstance(func, functools.partial):
        func = func.func
    if inspect.isroutine(func) or isinstance(func, type) or hasattr(func, "__wrapped__") or not callable(func):
        return func
    return type(func).__call__


def _name_of(func: Any) -> str:
    while isinstance(func, functools.partial):
        func = func.func
    named = func if hasattr(func, "__qualname__") else type(func)
    return f"{named.__module__}.{named.__qualname__}"


def _is_async(target: Any) -> bool:
    # A plain wrapper made with functools.wraps hands on the coroutine of what it wraps.
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(inspect.unwrap(target))


def _check_kind(func: Any, target: Any, kind: Kind, channel: Any, batch: int, where: str) -> None:
    wanted = Topic if kind == "subscriber" else Queue
    if not isinstance(channel, wanted):
        other = "subscriber" if isinstance(channel, Topic) else "consumer"
        raise ConfigError(f"{where}: a {kind} takes a {wanted.__name__}; use @bus.{other} here")
    if not callable(func) or isinstance(func, type):
        raise ConfigError(f"{where}: a handler is a function, a method or an object with __call__")
    for each in (target, inspect.unwrap(target)):
        if inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each):
            raise ConfigError(f"{where}: a handler can't be a generator; return instead of yield")
    if batch < 0 or isinstance(batch, bool):
        raise ConfigError(f"{where}: batch={batch}; use the most messages to be handled at once, 0 for one by one")
    if kind == "responder":
        if getattr(channel, "reply", None) is None:
            raise ConfigError(f"{where}: it has no reply type; declare it as Queue({channel.name!r}, ..., reply=...)")
        if batch:
            raise ConfigError(f"{where}: batch={batch}, but a responder answers one request at a time")


def _hints(target: Any, channel: Any, where: str, provided: Iterable[type]) -> dict[str, Any]:
    try:
        return get_type_hints(target, include_extras=True)
    except Exception:
        # Names imported under TYPE_CHECKING, and classes of an enclosing function, are not there at run time. Those that
        # a handler needs most are known anyway.
        known: dict[str, Any] = {
            t.__name__: t for t in (channel.body, getattr(channel, "reply", None)) if isinstance(t, type)
        }
        known |= {t.__name__: t for t in provided}
        known |= {"Annotated": Annotated, "Any": Any, "Delivery": Delivery, "Header": Header, "Message": Message}
    try:
        return get_type_hints(target, None, known, include_extras=True)
    except Exception as error:
        raise ConfigError(
            f"{where}: its annotations can't be read ({error}); import and define their names at module level, "
            "and not only under TYPE_CHECKING"
        ) from error


def _parameters(func: Any, where: str) -> tuple[inspect.Parameter, list[inspect.Parameter]]:
    """The body parameter, and those that the core has to fill."""
    bound: set[str] = set()
    inner = func
    while isinstance(inner, functools.partial):
        bound |= inner.keywords.keys()
        inner = inner.func
    try:
        parameters = [p for p in inspect.signature(func).parameters.values() if p.name not in bound]
    except (ValueError, TypeError, NameError) as error:
        raise ConfigError(f"{where}: its signature can't be read: {error}") from error
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            raise ConfigError(
                f"{where}: parameter '{stars}{parameter.name}': name each parameter (a decorator: add functools.wraps)"
            )
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise ConfigError(f"{where}: its first parameter has to take the body; it has none")
    return parameters[0], parameters[1:]


def _check_return(annotation: Any, kind: Kind, channel: Any, where: str) -> bool:
    """Check the return type. True if it says that the function returns an awaitable."""
    awaitable = get_origin(annotation) in (collections.abc.Awaitable, collections.abc.Coroutine)
    if awaitable:
        annotation = get_args(annotation)[-1]
    if annotation in (_MISSING, Never, NoReturn):
        return awaitable
    if kind != "responder":
        if annotation not in (None, NoneType):
            raise ConfigError(
                f"{where}: it returns {type_name(annotation)}, and nobody would get it: annotate `-> None`; "
                "only a responder answers"
            )
    elif not fits(channel.reply, annotation):
        raise ConfigError(f"{where}: it returns {type_name(annotation)}, but the reply is {type_name(channel.reply)}")
    return awaitable


def _check_body(parameter: inspect.Parameter, annotation: Any, channel: Any, batch: int, where: str) -> None:
    spot = f"{where}: parameter {parameter.name!r}"
    if _role(annotation) is not None or (batch and _role(item_of(annotation)) is not None):
        raise ConfigError(f"{spot}: the first parameter is the body; {type_name(annotation)} comes after it")
    if _header_in(annotation) is not None:
        raise ConfigError(f"{spot}: the first parameter is the body; a header comes after it")
    if annotation is _MISSING or _any_body(channel):
        return
    expected = list[channel.body] if batch else channel.body
    if not fits(annotation, expected):
        hint = ""
        if item_of(annotation) is not None and not batch:
            hint = "; a list of messages needs batch=n"
        elif batch and fits(annotation, channel.body):
            hint = f"; batch={batch} hands over a list"
        raise ConfigError(f"{spot} is a {type_name(annotation)}, but the body is {type_name(expected)}{hint}")


def _getter(annotation: Any, channel: Any, batch: int, spot: str) -> Callable[[Any], Any]:
    one = item_of(annotation) if batch else annotation
    role = _role(one)
    if role is Delivery:
        for body in get_args(one):
            if not _any_body(channel) and not fits(body, channel.body):
                raise ConfigError(f"{spot} is a {type_name(one)}, but the body is {type_name(channel.body)}")
        return _itself
    if role is Message:
        return _message_list if batch else _message
    said = "has no annotation" if annotation is _MISSING else f"is a {type_name(annotation)}"
    raise ConfigError(
        f"{spot} {said}, which unibus can't fill; {_ALLOWED_IN_BATCH if batch else f'{_ALLOWED}, {_PROVIDED}'}"
    )


def _any_body(channel: Any) -> bool:
    """A codec decides what bodies are; where the type was left out, it is not known here."""
    return channel.codec is not None and channel.body is bytes


def _role(annotation: Any) -> Any:
    plain = get_origin(annotation) or annotation
    return plain if plain in (Delivery, Message) else None


def _provided_as(annotation: Any, provided: Iterable[type]) -> type | None:
    plain = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    if not isinstance(plain, type) or plain is object:
        return None
    return next((type_ for type_ in provided if issubclass(type_, plain)), None)


def _header_in(annotation: Any) -> Header | None:
    if get_origin(annotation) is not Annotated:
        return None
    for extra in get_args(annotation)[1:]:
        if isinstance(extra, Header):
            return extra
    return None
