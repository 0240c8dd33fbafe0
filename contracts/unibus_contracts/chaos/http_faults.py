"""Faults of SQS and SNS, which are HTTP: answers that the service gives on a bad day, given by the proxy."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from unibus_contracts.chaos.proxy import Answer, Request
from unibus_contracts.chaos.stage import Fault, Stage, bit, reaches

_SHARE = 0.3  # of the requests, that meet the fault
_LATE = 14.0  # seconds: more than the client waits for the answer of a request (10, and its long poll)
_BATCHES = ("SendMessageBatch", "DeleteMessageBatch", "ChangeMessageVisibilityBatch")
_THROTTLED = ("ThrottlingException", "RequestThrottled", "OverLimit", "Throttling")
_FAILED = ("InternalError", "ServiceUnavailable", "RequestThrottled")

Judge = Callable[["Service", Request], Awaitable[Answer | None]]


@dataclass
class Service:
    """What a judge has at hand: the server behind the proxy, the seed's dice, and what it has done so far."""

    stage: Stage
    counts: Counter[str]
    judging: int = 0  # requests that have neither an answer nor been passed on

    async def ask(self, request: Request) -> Answer:
        """What the server itself answers."""
        return await asyncio.to_thread(_ask, self.stage.proxy.target, request)

    def drawn(self, share: float = _SHARE) -> bool:
        return self.stage.random.random() < share


def _ask(target: tuple[str, int], request: Request) -> Answer:
    link = http.client.HTTPConnection(*target, timeout=60)
    try:
        link.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name not in {"connection", "content-length", "transfer-encoding"}:
                link.putheader(name, value)
        link.putheader("Content-Length", str(len(request.body)))
        link.endheaders(request.body)
        answer = link.getresponse()
        kept = {"content-type", "x-amzn-requestid", "x-amzn-query-error"}
        return Answer(
            answer.status, answer.read(), {name: value for name, value in answer.getheaders() if name.lower() in kept}
        )
    finally:
        link.close()


def _error(request: Request, status: int, code: str, text: str) -> Answer:
    """As the service would write it in the protocol of the request: SQS speaks JSON, SNS XML."""
    if "x-amz-target" in request.headers:
        body = json.dumps({"__type": f"com.amazonaws.sqs#{code}", "message": text}).encode()
        return Answer(status, body, {"Content-Type": "application/x-amz-json-1.0"})
    kind = "Receiver" if status >= 500 else "Sender"
    xml = (
        f"<ErrorResponse><Error><Type>{kind}</Type><Code>{code}</Code><Message>{text}</Message></Error>"
        "<RequestId>chaos</RequestId></ErrorResponse>"
    )
    return Answer(status, xml.encode(), {"Content-Type": "text/xml"})


def _operation(request: Request) -> str:
    return request.headers.get("x-amz-target", "").rpartition(".")[2]


async def _failing(service: Service, request: Request) -> Answer | None:
    """500: half of the requests were carried out all the same."""
    if not service.drawn():
        return None
    if service.drawn(0.5):
        await service.ask(request)
        service.counts["were answered with 500 though they had been carried out"] += 1
    else:
        service.counts["were answered with 500"] += 1
    return _error(request, 500, "InternalFailure", "chaos")


async def _unavailable(service: Service, request: Request) -> Answer | None:
    """503, as a load balancer says it: no body that a client could read."""
    if not service.drawn():
        return None
    service.counts["were answered with 503"] += 1
    return Answer(503, b"<html><body>Service Unavailable</body></html>", {"Content-Type": "text/html"})


async def _throttled(service: Service, request: Request) -> Answer | None:
    if not service.drawn():
        return None
    service.counts["were throttled"] += 1
    return _error(request, 400, service.stage.random.choice(_THROTTLED), "Rate exceeded")


async def _torn(service: Service, request: Request) -> Answer | None:
    """Carried out, and the connection reset in the middle of the answer."""
    if not service.drawn(0.1):
        return None
    answer = await service.ask(request)
    service.counts["were cut off in the middle of their answer"] += 1
    return Answer(answer.status, answer.body, answer.headers, torn=True)


async def _late(service: Service, request: Request) -> Answer | None:
    """Carried out long after the client has given up."""
    if not service.drawn(0.05):
        return None
    service.counts[f"were carried out {_LATE:.0f} s late"] += 1
    await asyncio.sleep(_LATE)
    return await service.ask(request)


async def _partial(service: Service, request: Request) -> Answer | None:
    """200, and some entries of the batch have failed: they were not carried out."""
    if _operation(request) not in _BATCHES or not service.drawn(0.5):
        return None
    asked: dict[str, Any] = json.loads(request.body)
    failing = [entry for entry in asked["Entries"] if service.drawn(0.5)]
    if not failing:
        return None
    service.counts["entries of batches failed"] += len(failing)
    going = [entry for entry in asked["Entries"] if entry not in failing]
    said: dict[str, Any] = {"Successful": []}
    if going:
        rest = Request(request.method, request.path, request.headers, json.dumps(asked | {"Entries": going}).encode())
        answer = await service.ask(rest)
        if answer.status != 200:
            return answer
        said = json.loads(answer.body)
    failed = [
        {"Id": entry["Id"], "Code": code, "Message": "chaos", "SenderFault": code == "RequestThrottled"}
        for entry in failing
        for code in [service.stage.random.choice(_FAILED)]
    ]
    said["Failed"] = [*said.get("Failed", ()), *failed]
    return Answer(200, json.dumps(said).encode(), {"Content-Type": "application/x-amz-json-1.0"})


def _judged(judge: Judge) -> Fault:
    @asynccontextmanager
    async def fault(stage: Stage) -> AsyncIterator[None]:
        service = Service(stage, Counter())

        async def asked(request: Request) -> Answer | None:
            service.judging += 1
            try:
                return await judge(service, request)
            finally:
                service.judging -= 1

        stage.proxy.judge = asked
        try:
            yield
        finally:
            stage.proxy.judge = None
            # It is over when the last request that met it is: recovery is measured from then.
            await reaches(lambda: not service.judging, 2 * _LATE)
        bit(stage, service.counts.total(), "requests met the fault")
        stage.proof = "; ".join(f"{count} {what}" for what, count in sorted(service.counts.items()))

    return fault


FAULTS: Mapping[str, Fault] = {
    "http-500": _judged(_failing),
    "http-503": _judged(_unavailable),
    "http-throttled": _judged(_throttled),
    "http-torn": _judged(_torn),
    "http-late": _judged(_late),
    "http-partial": _judged(_partial),
}
