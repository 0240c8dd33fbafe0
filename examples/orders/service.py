"""The service: everything that a team would write. No line of it knows which broker it runs on.

What it sends, receives and answers is declared here; where the broker is, is a setting (`UNIBUS_URL`).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel

from examples.orders.generate import CATALOGUE
from examples.orders.payments import Journal, Payments
from unibus import Bus, DeadLetter, Discard, Queue, RetryPolicy, Topic


class Item(BaseModel):
    sku: str
    quantity: int
    price: int  # cents


class Order(BaseModel):
    id: str
    customer: str
    items: list[Item]
    total: int
    currency: str
    payment: str
    created_at: datetime
    pay_before: datetime | None = None


class OrderCharged(BaseModel):
    id: str
    customer: str
    total: int
    currency: str


class Ask(BaseModel):
    sku: str
    quantity: int


class Price(BaseModel):
    total: int


class Repaired(BaseModel):
    by: str


orders = Queue("orders", Order)
charged = Topic("order.charged", OrderCharged)
quotes = Queue("quotes", Ask, reply=Price)
repaired = Topic("provider.repaired", Repaired)


@dataclass
class Resources:
    journal: Journal
    payments: Payments


@asynccontextmanager
async def resources(_bus: Bus) -> AsyncIterator[Resources]:
    """`bus.state`: what the handlers need, opened after the bus and closed before it."""
    journal = Journal(Path(os.environ.get("ORDERS_JOURNAL", "orders.journal")))
    try:
        yield Resources(journal, Payments(journal))
    finally:
        journal.close()


bus = Bus(service="orders", lifespan=resources)


@bus.consumer(orders, concurrency=32, retry=RetryPolicy(max_retries=2, backoff=1, multiplier=2))
async def charge(order: Order) -> None:
    if order.total == 0:
        bus.state.journal.add("discarded", order.id)
        raise Discard("nothing to pay")
    if order.total < 0:
        raise DeadLetter("a negative total is a refund, not an order")
    await bus.state.payments.charge(order)
    # Also when the provider had charged it before: the run before this one may have died right here.
    event = OrderCharged(id=order.id, customer=order.customer, total=order.total, currency=order.currency)
    await bus.publish(charged, event, key=order.customer)


@bus.subscriber(charged, group="billing")
def bill(event: OrderCharged) -> None:
    """A plain function: it runs in a thread, and may block."""
    bus.state.journal.add("billed", event.id)


@bus.subscriber(charged, group="shipping", batch=50)
async def ship(events: list[OrderCharged]) -> None:
    """Up to 50 at once, as a warehouse would rather have them."""
    for event in events:
        bus.state.journal.add("shipped", event.id)


@bus.subscriber(repaired, broadcast=True)
async def resume(_event: Repaired) -> None:  # every process of the service hears it
    bus.state.payments.repair()


@bus.responder(quotes)
async def quote(ask: Ask) -> Price:
    if ask.sku not in CATALOGUE:
        raise LookupError(f"no such article: {ask.sku}")
    return Price(total=CATALOGUE[ask.sku] * ask.quantity)
