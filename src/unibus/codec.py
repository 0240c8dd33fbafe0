"""Bodies to bytes and back. What a channel's type means for the wire is decided once, here.

`bytes` go as they are; `str` as UTF-8 text; every other type as JSON by pydantic, straight from and to bytes; a channel
with a codec of its own uses that. No error of this module shows a body: it names the place and the kind of the problem,
and carries no cause, because pydantic's errors print the value.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from typing import Annotated, Any, Protocol, TypeVar, Union, get_args, get_origin

from unibus.channel import Codec, Queue, Topic
from unibus.errors import CodecError, ConfigError

T = TypeVar("T")

BYTES = "application/octet-stream"
TEXT = "text/plain; charset=utf-8"
JSON = "application/json"

_UTF8 = frozenset(("utf-8", "utf8", "us-ascii", "ascii"))
_SHOWN_PROBLEMS = 3
_CACHED = 1024  # channels and content types are few; the bound is for programs that make them in a loop
# A location may hold keys of the body itself. What does not look like a field or an index is shown as `*`.
_PLAIN_PART = re.compile(r"[A-Za-z_$][\w$.-]{0,40}|\d{1,5}", re.ASCII)
_POSITION = re.compile(r"line \d+ column \d+")
_MISFIT = re.compile(r"Pydantic serializer warnings:\s+\w+\([^\[]*\[field_name='([A-Za-z_]\w*)'")


class BodyCodec(Protocol):
    """How the bodies of one channel look on the wire."""

    @property
    def content_type(self) -> str:
        """The content type of what `encode` returns. A message without one is taken to have this one."""
        ...

    def encode(self, body: Any) -> bytes:
        """The bytes of `body`. Raises CodecError if it is not of the channel's type."""
        ...

    def decode(self, data: bytes, content_type: str | None = None) -> Any:
        """The body in `data`. Raises CodecError if it can't be read as the channel's type; never shows a value."""
        ...


def codec_for(channel: Queue[Any] | Topic[Any]) -> BodyCodec:
    """The codec of a channel, made once per channel object. Raises ConfigError if its type has no form on the wire."""
    return _once(_channels, channel, _of_channel)


def codec_of(type_: Any) -> BodyCodec:
    """The codec of a type that has no channel, such as a reply. Raises ConfigError if it has no form on the wire."""
    return _once(_types, type_, lambda t: _of_type(t, f"type {type_name(t)}"))


class Bounded:
    """A codec that does not look into a body above `limit` bytes: what it decodes comes from outside.

    Bytes are not looked into anyway: they have no limit.
    """

    def __init__(self, codec: BodyCodec, limit: int) -> None:
        self.content_type = codec.content_type
        self.encode = codec.encode
        if isinstance(codec, _Bytes):
            self.decode = codec.decode  # type: ignore[method-assign]  # without a call in between
        self._decode = codec.decode
        self._limit = limit

    def decode(self, data: bytes, content_type: str | None = None) -> Any:
        if len(data) > self._limit:
            raise CodecError(f"the body has {len(data)} bytes, and max_body is {self._limit}; it was not looked into")
        return self._decode(data, content_type)


def type_name(type_: Any) -> str:
    """A type as its reader would write it: `Order`, `list[Order]`, `Order | Refund`."""
    origin = get_origin(type_)
    if origin is Annotated:
        return type_name(get_args(type_)[0])
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(a) for a in get_args(type_))
    if origin is not None and isinstance(origin, type):
        return f"{origin.__name__}[{', '.join(type_name(a) for a in get_args(type_))}]"
    if type_ is None or type_ is types.NoneType:
        return "None"
    return type_.__qualname__ if isinstance(type_, type) else str(type_).removeprefix("typing.")


# Keyed by identity: channels are equal by name, and two programs of one process (tests) may give one name two types.
_channels: dict[int, tuple[Any, BodyCodec]] = {}
_types: dict[int, tuple[Any, BodyCodec]] = {}


def _once(cache: dict[int, tuple[Any, BodyCodec]], subject: T, make: Callable[[T], BodyCodec]) -> BodyCodec:
    found = cache.get(id(subject))
    if found is None:  # the entry holds the subject, so its id can't be given to another object
        if len(cache) >= _CACHED:
            cache.clear()
        found = cache[id(subject)] = (subject, make(subject))
    return found[1]


def _of_channel(channel: Queue[Any] | Topic[Any]) -> BodyCodec:
    if channel.codec is not None:
        return _Custom(channel.codec, channel.body, str(channel))
    return _of_type(channel.body, str(channel))


def _of_type(type_: Any, where: str) -> BodyCodec:
    if type_ is bytes:
        return _Bytes(where)
    if type_ is str:
        return _Text(where)
    return _Json(type_, where)


class _Bytes:
    content_type = BYTES

    def __init__(self, where: str) -> None:
        self._where = where

    def encode(self, body: Any) -> bytes:
        if type(body) is bytes:
            return body
        if isinstance(body, bytes | bytearray | memoryview):
            return bytes(body)  # a copy: the sender may go on writing into its buffer
        raise _wrong_type(self._where, "bytes", body)

    def decode(self, data: bytes, content_type: str | None = None) -> Any:
        return data


class _Text:
    """Any content type is read, as long as the bytes are UTF-8: JSON or XML as text is what `str` asks for."""

    content_type = TEXT

    def __init__(self, where: str) -> None:
        self._where = where
        self._accepted = _Accepted(where, TEXT, lambda _: True)

    def encode(self, body: Any) -> bytes:
        if not isinstance(body, str):
            raise _wrong_type(self._where, "str", body)
        try:
            return body.encode()
        except UnicodeEncodeError as error:
            at = error.start
        raise CodecError(f"{self._where}: the text has no UTF-8 form (a lone surrogate at character {at})")

    def decode(self, data: bytes, content_type: str | None = None) -> Any:
        if content_type:
            self._accepted.check(content_type)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            at = error.start
        raise CodecError(f"{self._where}: the body is not UTF-8 (byte {at}); a channel of bytes takes any content")


class _Json:
    """JSON by pydantic. Fields go by their alias, so that what was sent can be read back.

    A model instance was validated when it was made and is trusted; what was assigned to it since is checked by the
    consumer only (the check costs twice the encoding). Everything else, a dataclass too, is checked here.
    """

    content_type = JSON

    def __init__(self, type_: Any, where: str) -> None:
        from pydantic import BaseModel, TypeAdapter, ValidationError  # half of the import time of unibus, if at the top
        from pydantic.errors import PydanticUserError

        self._where = where
        self._type = type_
        self._model = type_ if isinstance(type_, type) and issubclass(type_, BaseModel) else None
        self._accepted = _Accepted(where, JSON, _is_json)
        self._invalid = ValidationError
        try:
            adapter = TypeAdapter(type_)
            self._dump = adapter.serializer.to_json
            self._load = adapter.validator.validate_json
        except (PydanticUserError, NameError, TypeError) as error:
            first = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"{where}: {type_name(type_)} has no JSON form ({first}); "
                "use a pydantic model, a dataclass, str, bytes, or give the channel a codec"
            ) from error

    def encode(self, body: Any) -> bytes:
        try:
            if self._model is None:
                return self._dump(body, by_alias=True, warnings="error")
            if isinstance(body, self._model):
                return self._dump(body, by_alias=True, warnings=False)
            problem = None
        except Exception as error:  # also what a serializer of the user's own raises; its text may show the value
            problem = error
        if problem is None or not _may_be(body, self._type):
            raise _wrong_type(self._where, type_name(self._type), body)
        raise CodecError(f"{self._where}: a {type(body).__qualname__} can't be encoded as JSON: {_unfit(problem)}")

    def decode(self, data: bytes, content_type: str | None = None) -> Any:
        if content_type and content_type != JSON:
            self._accepted.check(content_type)
        try:
            return self._load(data)
        except self._invalid as error:
            problem = problems(error) if data else "the body is empty"
        except Exception as error:  # a validator of the user's own
            problem = _failed_at(error)
        raise CodecError(f"{self._where}: the body is not a valid {type_name(self._type)}: {problem}")


class _Custom:
    """The user's codec. It is given what has its content type, or none: any other format it might misread."""

    def __init__(self, codec: Codec, type_: Any, where: str) -> None:
        self._codec = codec
        self._where = where
        self._type = type_ if isinstance(type_, type) and type_ is not bytes else None  # bytes: the type was left out
        self.content_type = codec.content_type
        known = (_media_type(codec.content_type), BYTES)
        self._accepted = _Accepted(where, codec.content_type, lambda media: media in known, text=False)

    def encode(self, body: Any) -> bytes:
        if self._type is not None and not _may_be(body, self._type):
            raise _wrong_type(self._where, type_name(self._type), body)
        try:
            data: object = self._codec.encode(body)  # whatever it promises
        except CodecError:
            raise
        except Exception as error:
            problem = _failed_at(error)
        else:
            if isinstance(data, bytes):
                return data
            problem = f"encode returned {type(data).__qualname__}, not bytes"
        raise CodecError(f"{self._where}: {type(self._codec).__qualname__}: {problem}")

    def decode(self, data: bytes, content_type: str | None = None) -> Any:
        if content_type and content_type != self.content_type:
            self._accepted.check(content_type)
        try:
            return self._codec.decode(data)
        except CodecError:
            raise
        except Exception as error:
            problem = _failed_at(error)
        raise CodecError(f"{self._where}: {type(self._codec).__qualname__}: {problem}")


class _Accepted:
    """The content types that one channel reads. Each is looked at once."""

    __slots__ = ("_default", "_known", "_media", "_text", "_where")

    def __init__(self, where: str, default: str, media: Callable[[str], bool], *, text: bool = True) -> None:
        self._where, self._default, self._media, self._text = where, default, media, text
        self._known: set[str] = {default}

    def check(self, content_type: str) -> None:
        if content_type in self._known:
            return
        if not self._media(_media_type(content_type)):
            raise CodecError(f"{self._where}: content type {_shown(content_type)}; it takes {self._default}")
        if self._text and (charset := _charset(content_type)) not in _UTF8:
            raise CodecError(f"{self._where}: charset {_shown(charset)}; it takes UTF-8")
        if len(self._known) < _CACHED:
            self._known.add(content_type)


def _is_json(media: str) -> bool:
    return media in (JSON, "text/json") or ("/" in media and media.endswith("+json"))


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _charset(content_type: str) -> str:
    for parameter in content_type.split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            return value.strip().strip("\"'").lower()
    return "utf-8"


def _shown(text: str) -> str:
    return ascii(text[:80])  # it came from outside


def _may_be(body: Any, type_: Any) -> bool:
    """False if `body` is certainly no `type_`. Looks at the outermost type only."""
    origin = get_origin(type_)
    if origin is Annotated:
        return _may_be(body, get_args(type_)[0])
    if origin in (Union, types.UnionType):
        return any(_may_be(body, member) for member in get_args(type_))
    try:
        return isinstance(body, origin or type_)
    except TypeError:  # no class: Any, a literal, a TypedDict
        return True


def _wrong_type(where: str, expected: str, body: Any) -> CodecError:
    return CodecError(f"{where} takes {expected}, not {type(body).__qualname__}")


def _unfit(error: BaseException) -> str:
    """What can be said about a failed encoding without its values."""
    text = str(error)
    if text.startswith("Unable to serialize unknown type"):
        return text[:200]
    if found := _MISFIT.match(text):
        return f"field {found[1]!r} does not hold what it declares"
    if text.startswith("Pydantic serializer warnings"):
        return "a part of it is not of the declared type"
    return _failed_at(error)


def problems(error: Any) -> str:
    """The first few problems of a pydantic ValidationError: place and kind, without text that may quote the input."""
    found = error.errors(include_url=False, include_input=False)
    shown = []
    for problem in found[:_SHOWN_PROBLEMS]:
        kind = problem["type"]
        if kind == "json_invalid" and (at := _POSITION.search(problem.get("ctx", {}).get("error", ""))):
            kind += f" at {at[0]}"
        parts = (str(part) for part in problem["loc"])
        place = ".".join(part if _PLAIN_PART.fullmatch(part) else "*" for part in parts)
        shown.append(f"{place}: {kind}" if place else kind)
    rest = len(found) - len(shown)
    return "; ".join(shown) + (f"; and {rest} more" if rest else "")


def _failed_at(error: BaseException) -> str:
    """Class and origin of an exception whose text may show the value."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_globals.get("__name__") == __name__:
        return type(error).__qualname__
    code = trace.tb_frame.f_code
    return f"{type(error).__qualname__} in {code.co_qualname}, line {trace.tb_lineno}"
