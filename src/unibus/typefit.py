"""Does an annotation agree with a declared type? Only a certain contradiction counts: what can't be told is fine."""

from __future__ import annotations

import types
from typing import Annotated, Any, NewType, TypeVar, Union, get_args, get_origin

_CONTAINERS = frozenset(("builtins", "collections.abc", "collections"))


def fits(holder: Any, held: Any) -> bool:
    """False if a value of type `held` certainly can't stand where `holder` is annotated.

    Equal types, superclasses, Any, object, protocols and unresolved type variables fit; an int fits a float.
    """
    holder, held = _plain(holder), _plain(held)
    if holder is held or holder in (Any, object) or held in (Any, object) or holder == held:
        return True
    if isinstance(holder, TypeVar) or isinstance(held, TypeVar):
        return True
    if _is_union(held):
        return all(fits(holder, member) for member in get_args(held))
    if _is_union(holder):
        return any(fits(member, held) for member in get_args(holder))
    wide, narrow = get_origin(holder) or holder, get_origin(held) or held
    if not isinstance(wide, type) or not isinstance(narrow, type):
        return True  # a literal or another special form: not ours to judge
    try:
        if not issubclass(narrow, wide):
            return wide in (float, complex) and narrow in (int, float)
    except TypeError:  # a TypedDict or a protocol, which refuse the question
        return True
    ours, theirs = get_args(holder), get_args(held)
    comparable = wide is narrow or {wide.__module__, narrow.__module__} <= _CONTAINERS
    if not comparable or len(ours) != len(theirs):
        return True
    return all(fits(a, b) for a, b in zip(ours, theirs, strict=True))


def item_of(annotation: Any) -> Any:
    """The T of `list[T]` or of a protocol that lists fulfil; None if it is something else."""
    origin, arguments = get_origin(_plain(annotation)), get_args(_plain(annotation))
    takes_list = isinstance(origin, type) and issubclass(list, origin)
    return arguments[0] if takes_list and len(arguments) == 1 else None


def _plain(type_: Any) -> Any:
    """Without Annotated, NewType and the aliases of Python 3.12."""
    while True:
        if get_origin(type_) is Annotated:
            type_ = get_args(type_)[0]
        elif isinstance(type_, NewType):
            type_ = type_.__supertype__
        elif type(type_).__name__ == "TypeAliasType":
            type_ = type_.__value__
        else:
            return types.NoneType if type_ is None else type_


def _is_union(type_: Any) -> bool:
    return get_origin(type_) in (Union, types.UnionType)
