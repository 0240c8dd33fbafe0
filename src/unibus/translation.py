"""Errors of a client library as ours: the part that is the same for every broker, and the search for a host that answers."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from unibus.errors import (
    AuthenticationFailed,
    ConfigError,
    ConnectionLost,
    PermissionDenied,
    Timeout,
    UnibusError,
)

H = TypeVar("H")
T = TypeVar("T")

FATAL = AuthenticationFailed | PermissionDenied | ConfigError  # another host would say the same


def common(exc: BaseException, doing: str, broker: str) -> UnibusError | None:
    """The error to raise `from exc` where no broker differs; None: the driver's own table decides.

    `doing`: what was tried, with the object's name. Asked first: TimeoutError is an OSError.
    """
    if isinstance(exc, UnibusError):
        return exc
    if (words := untrusted(exc)) is not None:
        return ConfigError(f"{doing}: the certificate is not trusted ({words}); set {broker.lower()}.ca_file")
    if isinstance(exc, TimeoutError):
        return Timeout(f"{doing}: no answer from {broker} in time")
    return None


def untrusted(exc: BaseException) -> str | None:
    """Why TLS refused the certificate, if that is what the error, or its cause, says."""
    for error in (exc, exc.__cause__, exc.__context__):
        if isinstance(error, ssl.SSLCertVerificationError):
            return getattr(error, "verify_message", "") or str(error)  # not set where it was made by hand
    return None


def wrong_password(doing: str, more: str = "") -> AuthenticationFailed:
    return AuthenticationFailed(f"{doing}: wrong user or password; check username and UNIBUS_PASSWORD{more}")


def of_host(error: UnibusError) -> UnibusError:
    """During connect: what another host would say as well stays as it is, all else is a host that can't be had."""
    return error if isinstance(error, FATAL | ConnectionLost) else ConnectionLost(str(error))


async def first_that_answers(hosts: Iterable[H], open_: Callable[[H], Awaitable[T]]) -> T:
    """The first host that `open_` succeeds with; it raises our errors.

    Wrong credentials, missing rights and wrong settings end the search. Raises ConnectionLost with the words of every host.
    """
    problems: list[UnibusError] = []
    for host in hosts:
        try:
            return await open_(host)
        except UnibusError as error:
            if isinstance(error, FATAL):
                raise
            problems.append(error)
    raise ConnectionLost("; ".join(map(str, problems))) from problems[-1]
