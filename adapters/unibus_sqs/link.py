"""The clients of SQS and SNS. There is no connection to lose: each request is its own, and so is its failure."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import cache
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import get_session
from botocore.exceptions import UnknownRegionError
from botocore.loaders import Loader, create_loader

from unibus.adapter import Url
from unibus.driver import as_result, quiet
from unibus.errors import ConfigError, ConnectionLost, NotFound, PermissionDenied, TransportError, UnibusError
from unibus_sqs import config, errors
from unibus_sqs.direct import Call, Direct

BATCH = 10  # entries that a request takes
_ANSWER = 10.0  # seconds that a request may take beyond its long poll


@cache
def _loader() -> Loader:
    """Shared by all sessions: it reads the description of a service once, which takes longer than all the rest."""
    return create_loader()


class Link:
    """`sqs` and `sns` are the clients; `trouble` says why the last request got no answer.

    What runs for every message has its methods here: they are shorter ways to what those of `sqs` do.
    """

    send_message_batch: Call
    receive_message: Call
    delete_message_batch: Call
    change_message_visibility_batch: Call

    def __init__(self, url: Url, settings: config.Settings) -> None:
        self.trouble: str | None = "not connected"
        self.sqs: Any = None
        self.sns: Any = None
        self.region = ""
        self._url = url
        self._settings = settings
        self._stack = AsyncExitStack()
        self._session = get_session()
        self._session.register_component("data_loader", _loader())
        self._account = settings.account_id
        self._partition = "aws"

    async def open(self) -> None:
        """Raises ConnectionLost, AuthenticationFailed, ConfigError."""
        quiet(logging.INFO, "botocore", "aiobotocore")  # their DEBUG lines hold whole requests, bodies and signatures
        session = self._session
        self.region = config.region(self._url) or session.get_config_variable("region") or ""
        if not self.region:
            raise ConfigError("url: there is no region; write it as the host, as in sqs://eu-west-1")
        try:
            self._partition = session.get_partition_for_region(self.region)
        except UnknownRegionError as exc:
            if self._settings.endpoint_url is None:
                raise ConfigError(
                    f"url: {self.region!r} is no region of AWS; write one as the host: sqs://eu-west-1"
                ) from exc
        if self._url.username is not None and self._url.password is not None:
            session.set_credentials(self._url.username, self._url.password.value)
        https: list[AIOHTTPSession] = []

        def http(**given: Any) -> AIOHTTPSession:
            https.append(AIOHTTPSession(**given))
            return https[-1]

        self.sqs = await self._client("sqs", http_session_cls=http)
        self.sns = await self._client("sns")
        direct = Direct(self.sqs, https[0], await session.get_credentials())
        self.send_message_batch = direct.operation("SendMessageBatch", "send_message_batch")
        self.receive_message = direct.operation("ReceiveMessage", "receive_message")
        self.delete_message_batch = direct.operation("DeleteMessageBatch", "delete_message_batch")
        self.change_message_visibility_batch = direct.operation(
            "ChangeMessageVisibilityBatch", "change_message_visibility_batch"
        )
        try:  # any answer shows that the service is there and knows us; a right to list is not needed
            await self.call(self.sqs.list_queues, "connect", MaxResults=1)
        except PermissionDenied:
            self.trouble = None

    async def _client(self, service: str, **more: Any) -> Any:
        settings = self._settings
        client = self._session.create_client(
            service,
            region_name=self.region,
            endpoint_url=settings.endpoint_url,
            verify=None if settings.ca_file is None else str(settings.ca_file),
            config=AioConfig(
                retries={"total_max_attempts": 1, "mode": "standard"},  # the core sends again
                connect_timeout=settings.connect_timeout,
                read_timeout=settings.wait + _ANSWER,
                max_pool_connections=settings.connections,
                parameter_validation=False,  # a fifth of the time of a request; the service checks as well
                **more,
            ),
        )
        return await self._stack.enter_async_context(client)

    async def call(self, operation: Any, doing: str, **parameters: Any) -> dict[str, Any]:
        """One request. Raises what it came to, as unibus' errors."""
        try:
            answer: dict[str, Any] = await operation(**parameters)
        except Exception as exc:
            error = errors.translate(exc, f"{doing} ({self.region})")
            if isinstance(error, ConnectionLost):
                self.trouble = str(error)
            raise error from exc
        self.trouble = None
        return answer

    async def batch(
        self, operation: Any, doing: str, name: str, entries: Sequence[dict[str, Any]], **where: Any
    ) -> list[TransportError | None]:
        """One request with up to ten entries, by the `name` of its parameter; one result for each."""
        numbered = [{"Id": str(i), **entry} for i, entry in enumerate(entries)]
        try:
            answer = await self.call(operation, doing, **{name: numbered}, **where)
        except UnibusError as error:
            return [as_result(error) for _ in entries]
        results: list[TransportError | None] = [None] * len(entries)
        for failed in answer.get("Failed") or ():
            results[int(failed["Id"])] = errors.of_entry(failed, doing)
        return results

    async def queue_url(self, name: str) -> str:
        """Raises NotFound."""
        answer = await self.call(self.sqs.get_queue_url, f"look for queue {name!r}", QueueName=name)
        return str(answer["QueueUrl"])

    async def attributes(self, url: str, *names: str) -> dict[str, str]:
        """Of a queue."""
        answer = await self.call(
            self.sqs.get_queue_attributes, f"look at {url}", QueueUrl=url, AttributeNames=list(names)
        )
        return dict(answer["Attributes"])

    async def topic_arn(self, name: str) -> str:
        """Of a topic that may not be there: SNS has no way to ask by name."""
        if self._account is None:
            try:
                sts = await self._client("sts")
                answer = await self.call(sts.get_caller_identity, "look for the account of the topics")
            except UnibusError as error:
                raise ConfigError(f"{error}; set sqs.account_id") from error
            self._account = str(answer["Account"])
        return f"arn:{self._partition}:sns:{self.region}:{self._account}:{name}"

    async def subscriptions(self, topic_arn: str, queue_arn: str) -> list[str]:
        """Of this queue to this topic. Raises NotFound when the topic is not there."""
        found: list[str] = []
        token: dict[str, str] = {}
        while True:
            answer = await self.call(
                self.sns.list_subscriptions_by_topic, f"look at {topic_arn}", TopicArn=topic_arn, **token
            )
            found += [s["SubscriptionArn"] for s in answer["Subscriptions"] if s["Endpoint"] == queue_arn]
            if found or not answer.get("NextToken"):
                return found
            token = {"NextToken": answer["NextToken"]}

    async def exists(self, name: str) -> str:
        """The URL of a queue; empty where there is none."""
        try:
            return await self.queue_url(name)
        except NotFound:
            return ""

    async def close(self) -> None:
        self.trouble = "closed"
        await self._stack.aclose()
