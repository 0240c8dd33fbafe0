"""An adapter that writes down what it is told: which sends were not confirmed, which settlements were, and what was taken away.

A service only sees its handlers run. Why a message came twice is seen here, at the seam between core and driver: its
settlement was not confirmed, its link or lease was gone, or the message was sent twice because the first time had no answer.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

from unibus import bus as bus_module
from unibus.adapter import Adapter, AdapterFactory, Move, Outcome, Outgoing, Results, Source, Subscription
from unibus.channel import Address, Group
from unibus.delivery import Delivery
from unibus.errors import ConnectionLost, LeaseLost, TransportError, Unsupported
from unibus_contracts.history import Recorder
from unibus_contracts.history.record import FINAL

_KAFKA = logging.getLogger("unibus.kafka")
_UNSURE = 100_000  # messages that were settled last, where that is not confirmed
_SAID = {Outcome.ACCEPTED: "accepted", Outcome.RELEASED: "released"}


def values(bodies: Sequence[bytes], value_of: Callable[[bytes], str]) -> str:
    """As one line of the history names many."""
    return " ".join(value_of(body) for body in bodies)


def watch(recorder: Recorder, value_of: Callable[[bytes], str]) -> None:
    """From now on every bus of this process has its adapter watched. `value_of`: what the history calls a message, from its body.

    Nothing leaves the process beside the adapter, so the recorder may gather what is said in one turn of the event loop: it is
    flushed before each send and each settlement.
    """
    recorder.by_tick = True
    name = "adapter_factory"  # by which a bus finds it; nothing else is replaced
    real = getattr(bus_module, name)

    def factory(scheme: str) -> AdapterFactory:
        make = real(scheme)
        return lambda endpoint: watched(make(endpoint), recorder, value_of)

    setattr(bus_module, name, factory)


def watched(adapter: Adapter, recorder: Recorder, value_of: Callable[[bytes], str]) -> Adapter:
    """The same adapter, writing down."""
    return cast(Adapter, _Watched(adapter, recorder, value_of))


class _Watched:
    def __init__(self, inner: Adapter, recorder: Recorder, value_of: Callable[[bytes], str]) -> None:
        self._inner = inner
        self.recorder = recorder
        self.value_of = value_of
        self.copied: dict[int, Delivery[Any]] = {}  # a copy of these is confirmed, and they are not settled yet
        self._unsure: OrderedDict[tuple[str, str], bytes] = OrderedDict()  # settled: body, by address and position
        self._hearing = _Uncommitted(self)
        _KAFKA.addHandler(self._hearing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def note(self, what: Any, kind: Any, messages: Sequence[bytes], to: Address, detail: str = "") -> None:
        about = _where(to) | ({"detail": detail} if detail else {})
        self.recorder.note(what, kind, value=values(messages, self.value_of), **about)

    async def close(self) -> None:
        self.recorder.note("lost", detail="the link was closed")
        await self._inner.close()
        _KAFKA.removeHandler(self._hearing)

    def settled(self, address: Address, deliveries: Sequence[Delivery[Any]]) -> None:
        """As far as the adapter says, which can be wrong where the broker confirms no settlement."""
        if not self._inner.capabilities.settle_confirmed:
            for delivery in deliveries:
                self._unsure[str(address), delivery.position] = delivery.message.body
            while len(self._unsure) > _UNSURE:
                self._unsure.popitem(last=False)

    def uncommitted(self, address: Address, positions: Sequence[str]) -> None:
        known = [body for at in positions if (body := self._unsure.get((str(address), at))) is not None]
        if known:
            self.note("uncommitted", "ok", known, address)

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        self.recorder.flush()
        try:
            results = await self._inner.send(batch, timeout)
        except BaseException as error:
            if not isinstance(error, FINAL):
                self.note("try", "unknown", [out.message.body for out in batch], batch[0].to, type(error).__name__)
            raise
        copies = []
        for out, refusal in zip(batch, results, strict=True):
            if refusal is not None:
                if not isinstance(refusal, FINAL):
                    self.note("try", "unknown", [out.message.body], out.to, type(refusal).__name__)
            elif out.origin is not None:
                self.copied[id(out.origin)] = out.origin
                copies.append(out)
        if copies:
            self.note("copied", "ok", [out.message.body for out in copies], copies[0].to)
        return results

    async def subscribe(self, source: Source) -> Subscription:
        given_up = source.losing

        async def losing(deliveries: Sequence[Delivery[Any]], grace: float) -> None:
            if deliveries:
                self.note("lost", "ok", [d.message.body for d in deliveries], source.address, "taken away")
            await given_up(deliveries, grace)

        try:
            inner = await self._inner.subscribe(replace(source, losing=losing))
        except ConnectionLost:
            self.lost()
            raise
        return cast(Subscription, _WatchedSubscription(self, inner, source.address))

    def lost(self) -> None:
        self.recorder.note("lost", detail="the link broke")


class _Uncommitted(logging.Handler):
    """Kafka's adapter has nobody to return it to: commits that fail are said in its log, with what they were about."""

    def __init__(self, adapter: _Watched) -> None:
        super().__init__(logging.WARNING)
        self._adapter = adapter

    def emit(self, record: logging.LogRecord) -> None:
        if (positions := record.__dict__.get("positions")) is not None:
            self._adapter.uncommitted(record.__dict__["address"], positions)


class _WatchedSubscription:
    def __init__(self, adapter: _Watched, inner: Subscription, address: Address) -> None:
        self._adapter, self._inner, self._address = adapter, inner, address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        try:
            return await self._inner.receive(limit, timeout)
        except ConnectionLost:
            self._adapter.lost()
            raise

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        copied = self._adapter.copied
        said = [_SAID[outcome] if copied.pop(id(d), None) is None else "moved" for d in deliveries]
        with ExitStack() as stack:
            tell = self._settling(stack, deliveries, said)
            self._adapter.recorder.flush()
            results = await self._inner.settle(outcome, deliveries, delays=delays)
            tell(results)
            if outcome is Outcome.ACCEPTED:
                self._adapter.settled(
                    self._address, [d for d, failed in zip(deliveries, results, strict=True) if failed is None]
                )
            return results

    async def move(self, moves: Sequence[Move], timeout: float) -> Sequence[TransportError | Unsupported | None]:
        with ExitStack() as stack:
            tell = self._settling(stack, [move.delivery for move in moves], ["moved"] * len(moves))
            self._adapter.recorder.flush()
            results = await self._inner.move(moves, timeout)
            tell(results)
            return results

    def _settling(
        self, stack: ExitStack, deliveries: Sequence[Delivery[Any]], said: Sequence[str]
    ) -> Callable[[Sequence[BaseException | None]], None]:
        """Begin an operation for each thing said; who is told the results ends them."""
        adapter, ends = self._adapter, {}
        for word in set(said):
            bodies = [d.message.body for d, s in zip(deliveries, said, strict=True) if s == word]
            about = _where(self._address) | {"detail": word, "value": values(bodies, adapter.value_of)}
            ends[word] = stack.enter_context(adapter.recorder.during("settled", **about))

        def tell(results: Sequence[BaseException | None]) -> None:
            for word, end in ends.items():
                failed = [
                    (d, r) for d, s, r in zip(deliveries, said, results, strict=True) if s == word and r is not None
                ]
                if failed:
                    end.kind, end.detail = "unknown", type(failed[0][1]).__name__
                    end.value = values([d.message.body for d, _ in failed], adapter.value_of)

        return tell

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        results = await self._inner.extend(deliveries, seconds)
        gone = [d for d, result in zip(deliveries, results, strict=True) if isinstance(result, LeaseLost)]
        if gone:
            self._adapter.note("lost", "ok", [d.message.body for d in gone], self._address, "lease lost")
        return results


def _where(address: Address) -> dict[str, Any]:
    if isinstance(address, Group):
        return {"place": address.topic.name, "group": address.name}
    return {"place": str(getattr(address, "name", ""))}
