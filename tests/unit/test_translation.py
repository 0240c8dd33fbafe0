"""Errors that are the same for every broker, and the search for a host."""

from __future__ import annotations

import ssl

import pytest

from unibus.errors import AuthenticationFailed, ConfigError, ConnectionLost, PermissionDenied, Refused, Timeout
from unibus.translation import common, first_that_answers, of_host, wrong_password


def test_ours_stay_what_they_are() -> None:
    error = Refused("no")
    assert common(error, "send", "Redis") is error


def test_no_answer_in_time_and_the_rest_is_the_driver_s() -> None:
    error = common(TimeoutError(), "send to queue 'q'", "Redis")
    assert isinstance(error, Timeout)
    assert str(error) == "send to queue 'q': no answer from Redis in time"
    assert common(OSError("gone"), "send", "Redis") is None


@pytest.mark.parametrize("how", ["itself", "cause", "context"])
def test_a_certificate_that_is_not_trusted_names_the_setting(how: str) -> None:
    refused = ssl.SSLCertVerificationError(1, "self-signed")
    error: BaseException = refused
    if how != "itself":
        error = OSError("connect")
        setattr(error, f"__{how}__", refused)
    found = common(error, "connect", "Kafka")
    assert isinstance(found, ConfigError)
    assert "set kafka.ca_file" in str(found)


def test_a_certificate_of_another_name_is_not_the_authority_s_fault() -> None:
    outer, inner = ssl.SSLCertVerificationError("made by hand"), ssl.SSLCertVerificationError(1, "no match")
    inner.verify_code, inner.verify_message = 62, "Hostname mismatch"
    outer.__context__ = OSError("connect")
    outer.__context__.__cause__ = inner
    found = common(outer, "connect", "AWS", "sqs")
    assert isinstance(found, ConfigError)
    assert str(found) == (
        "connect: the certificate is not trusted (Hostname mismatch); use a name of the certificate as the host of url"
    )
    inner.verify_code = 20
    assert "set sqs.ca_file" in str(common(outer, "connect", "AWS", "sqs"))


@pytest.mark.parametrize(
    ("reason", "advice"),
    [("WRONG_VERSION_NUMBER", "speaks no TLS"), ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "cert_file")],
)
def test_a_handshake_that_fails_says_what_to_check(reason: str, advice: str) -> None:
    error = ssl.SSLError(1, f"[SSL: {reason}] some words")
    found = common(error, "connect", "Redis")
    assert isinstance(found, ConnectionLost)
    assert advice in str(found)


def test_errors_that_came_from_each_other_have_an_end() -> None:
    one, other = OSError("one"), OSError("other")
    one.__cause__, other.__cause__ = other, one
    assert common(one, "connect", "Redis") is None


def test_a_host_that_can_not_be_had_is_a_lost_connection() -> None:
    for fatal in (AuthenticationFailed("a"), PermissionDenied("b"), ConfigError("c"), ConnectionLost("d")):
        assert of_host(fatal) is fatal
    for passing in (Timeout("no answer"), Refused("too many clients")):
        found = of_host(passing)
        assert isinstance(found, ConnectionLost)
        assert str(found) == str(passing)


def test_a_wrong_password_says_what_to_check() -> None:
    assert "UNIBUS_PASSWORD, and the mechanism" in str(wrong_password("connect", ", and the mechanism"))


async def test_the_first_host_that_answers() -> None:
    asked: list[str] = []

    async def open_(host: str) -> str:
        asked.append(host)
        if host.startswith("dead"):
            raise ConnectionLost(f"{host} is dead")
        return host

    assert await first_that_answers(["dead-1", "b", "c"], open_) == "b"
    assert asked == ["dead-1", "b"]
    with pytest.raises(ConnectionLost, match="dead-1 is dead; dead-2 is dead"):
        await first_that_answers(["dead-1", "dead-2"], open_)


@pytest.mark.parametrize("kind", [AuthenticationFailed, PermissionDenied, ConfigError])
async def test_what_every_host_would_say_ends_the_search(kind: type[Exception]) -> None:
    asked: list[str] = []

    async def open_(host: str) -> str:
        asked.append(host)
        raise kind("no")

    with pytest.raises(kind):
        await first_that_answers(["a", "b"], open_)
    assert asked == ["a"]
