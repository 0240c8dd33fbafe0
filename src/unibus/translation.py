"""Errors of a client library as ours: the part that is the same for every broker, and the search for a host that answers."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator
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

_OTHER_NAME = (62, 64)  # OpenSSL: the host, the IP address is none of the certificate's
_DEEPEST = 20

FATAL = AuthenticationFailed | PermissionDenied | ConfigError  # another host would say the same


def common(exc: BaseException, doing: str, broker: str, section: str = "") -> UnibusError | None:
    """The error to raise `from exc` where no broker differs; None: the driver's own table decides.

    `doing`: what was tried, with the object's name; `section`: the driver's table, where it isn't called like the broker.
    Asked first: TimeoutError is an OSError.
    """
    if isinstance(exc, UnibusError):
        return exc
    section = section or broker.lower()
    if (refused := untrusted(exc)) is not None:
        words, name = refused
        advice = "use a name of the certificate as the host of url" if name else f"set {section}.ca_file"
        return ConfigError(f"{doing}: the certificate is not trusted ({words}); {advice}")
    if (advice_ := no_tls(exc)) is not None:  # not a ConfigError: what is in between may answer so for a while
        return ConnectionLost(f"{doing}: {advice_}")
    if isinstance(exc, TimeoutError):
        return Timeout(f"{doing}: no answer from {broker} in time")
    return None


def chain(exc: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [exc]
    while waiting:
        error = waiting.pop(0)
        if error is not None and id(error) not in seen and len(seen) < _DEEPEST:
            seen.add(id(error))
            yield error
            waiting += (error.__cause__, error.__context__)


def untrusted(exc: BaseException) -> tuple[str, bool] | None:
    """Why TLS refused the certificate, and whether it is for its name; None if that is not what the error is about."""
    found: tuple[str, bool] | None = None
    for error in chain(exc):
        if isinstance(error, ssl.SSLCertVerificationError):
            if words := getattr(error, "verify_message", ""):
                return words, error.verify_code in _OTHER_NAME
            found = found or (str(error), False)  # made by hand: look on for the one that it stands for
    return found


def no_tls(exc: BaseException) -> str | None:
    """What to do about a server that talks without TLS, or refuses the client's certificate; None for all else."""
    for error in chain(exc):
        if isinstance(error, ssl.SSLError):
            reason = getattr(error, "reason", None) or str(error)  # not set where it was made by hand
            if any(word in reason for word in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")):
                return "what answers there speaks no TLS; check scheme and port of url"
            if any(
                word in reason
                for word in ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE", "UNKNOWN_CA", "BAD_CERTIFICATE")
            ):
                return "the server refuses our certificate, or wants one; check cert_file and key_file"
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
