"""What all requests of one operation have in common, and the Signature Version 4 of each."""

from __future__ import annotations

import hmac
import re
import time
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=[^/]+/\d{8}/(?P<scope>[^/]+/[^/]+)/aws4_request, *SignedHeaders=(?P<names>[^,]+), "
)
_ANEW = {"host", "x-amz-date", "x-amz-security-token"}  # headers that are signed, and made for each request
_BEFORE = {
    "content-type"
}  # those that are the same in each request, and come before these in the order of the alphabet
_AFTER = {"x-amz-target", "x-amzn-query-mode"}  # and behind them


@dataclass(slots=True)
class Pattern:
    """Of requests that differ in body and time alone. `scope`: region and service."""

    url: str
    scope: str
    headers: dict[str, str]
    before: str  # lines of what is signed, around those that are made for each request
    after: str
    names: str  # of all signed headers but the token's
    _key: tuple[str, str, bytes] = field(default=("", "", b""), repr=False)

    def signed(self, body: bytes, access_key: str, secret: str, token: str | None, at: float) -> dict[str, str]:
        """The headers of a request. `at`: seconds since the epoch."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(at))
        day, names, tokens = stamp[:8], self.names, ""
        headers = {**self.headers, "X-Amz-Date": stamp}
        if token:
            headers["X-Amz-Security-Token"] = token
            names = names.replace(";x-amz-date", ";x-amz-date;x-amz-security-token")
            tokens = f"x-amz-security-token:{token}\n"
        canonical = (
            f"POST\n/\n\n{self.before}x-amz-date:{stamp}\n{tokens}{self.after}\n{names}\n{sha256(body).hexdigest()}"
        )
        scope = f"{day}/{self.scope}/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{sha256(canonical.encode()).hexdigest()}"
        signature = _hmac(self._signing_key(secret, day), text).hex()
        headers["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
        )
        return headers

    def _signing_key(self, secret: str, day: str) -> bytes:
        """The same all day, as long as the secret is."""
        known_secret, known_day, key = self._key
        if known_secret != secret or known_day != day:
            key = f"AWS4{secret}".encode()
            for part in (day, *self.scope.split("/"), "aws4_request"):
                key = _hmac(key, part)
            self._key = secret, day, key
        return key


def pattern(request: Any) -> Pattern | None:
    """Of a prepared request that botocore has signed; None where the next one might have to look different."""
    headers = {name: value.decode() if isinstance(value, bytes) else value for name, value in request.headers.items()}
    found = _AUTHORIZATION.match(headers.get("Authorization", ""))
    parts = urlsplit(request.url)
    if found is None or request.method != "POST" or parts.path != "/" or parts.query or parts.hostname is None:
        return None
    same = set(found["names"].split(";")) - _ANEW
    if not same <= _BEFORE | _AFTER:
        return None
    kept = {name: value for name, value in headers.items() if name.lower() in same | {"user-agent"}}
    lines = {name.lower(): f"{name.lower()}:{' '.join(value.split())}\n" for name, value in kept.items()}
    lines["host"] = f"host:{_host(request.url)}\n"
    before, after = sorted(same & _BEFORE | {"host"}), sorted(same & _AFTER)
    return Pattern(
        request.url,
        found["scope"],
        kept,
        "".join([lines[name] for name in before]),
        "".join([lines[name] for name in after]),
        ";".join([*before, "x-amz-date", *after]),
    )


def _host(url: str) -> str:
    """As an HTTP client writes it."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return f"{host}" if parts.port in {None, default} else f"{host}:{parts.port}"


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")
