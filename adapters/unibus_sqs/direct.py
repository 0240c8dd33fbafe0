"""Requests that run all the time, without what the client does anew for each of them though it comes out the same.

Eight tenths of the time of an aiobotocore request go into finding the endpoint, the hooks, two user agents, and serializers that
walk AWS' description of the service. Here the first request of each operation goes through the client, which shows what
it looks like; the next ones differ from it in body, time and signature only. They go through the client's own HTTP session (pool,
proxies, TLS, time limits), with the session's own credentials, which refresh themselves, and errors are read by botocore.
What isn't understood, for one a request without a Signature Version 4, stays with the client.
"""

from __future__ import annotations

import json
import time
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable
from typing import Any

from botocore.awsrequest import AWSPreparedRequest
from botocore.exceptions import ClientError
from botocore.parsers import create_parser
from pydantic_core import from_json

from unibus_sqs.signature import Pattern, pattern

Call = Callable[..., Awaitable[dict[str, Any]]]


class Direct:
    """Operations of one client of SQS. `http` is its HTTP session, `credentials` those that it was made with."""

    def __init__(self, client: Any, http: Any, credentials: Any) -> None:
        self._client = client
        self._http = http
        self._credentials = credentials
        self._patterns: dict[str, Pattern | None] = {}
        self._errors = create_parser("json")
        client.meta.events.register("before-send.sqs", self._seen)

    def operation(self, name: str, method: str) -> Call:
        """By AWS' name and by that of the client's method. Takes and returns what the method does, except for metadata."""

        async def call(**parameters: Any) -> dict[str, Any]:
            known = self._patterns.get(name)
            if known is None:
                answer: dict[str, Any] = await getattr(self._client, method)(**parameters)
                return answer
            return await self._request(name, known, parameters)

        return call

    def _seen(self, request: Any, event_name: str, **_: Any) -> None:
        """A request of the client's, as it goes out."""
        name = event_name.rpartition(".")[2]
        if name not in self._patterns:
            self._patterns[name] = pattern(request)

    async def _request(self, name: str, known: Pattern, parameters: dict[str, Any]) -> dict[str, Any]:
        """Raises what the client's method would."""
        body = json.dumps(parameters, separators=(",", ":"), default=_base64).encode()
        keys = await self._credentials.get_frozen_credentials()
        headers = known.signed(body, keys.access_key, keys.secret_key, keys.token, time.time())
        request = AWSPreparedRequest("POST", known.url, headers, body, stream_output=False)
        response = await self._http.send(request)
        content: bytes = await response.content
        if response.status_code >= 300:  # as the client does
            found = {"status_code": response.status_code, "headers": response.headers, "body": content, "context": {}}
            raise ClientError(self._errors.parse(found, None), name)
        return _parsed(content)


def _base64(value: bytes) -> str:
    """Of a binary attribute."""
    return b64encode(value).decode()


def _parsed(content: bytes) -> dict[str, Any]:
    if not content:
        return {}
    try:
        answer: dict[str, Any] = from_json(content)  # a quarter of json's time
    except ValueError:
        answer = json.loads(content)  # takes half of a surrogate pair, too
    if b'"BinaryValue"' in content:
        for message in answer.get("Messages") or ():
            for attribute in (message.get("MessageAttributes") or {}).values():
                if "BinaryValue" in attribute:
                    attribute["BinaryValue"] = b64decode(attribute["BinaryValue"])
    return answer
