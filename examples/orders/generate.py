"""Writes `orders.jsonl`, and beside it what has to become of its lines. The same seed makes the same bytes.

    python -m examples.orders.generate

The expectations are counted here, while the lines are made, and not derived from the service's rules: what the demo
compares comes from two places.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

DATA = Path(__file__).with_name("orders.jsonl")

CATALOGUE: Mapping[str, int] = MappingProxyType(  # price in cents
    {
        "coffee-beans-500g": 1190,
        "coffee-filter-100": 349,
        "cup-porcelain": 895,
        "grinder-hand": 5900,
        "kettle-steel-1l": 4450,
        "tea-assam-250g": 990,
        "tea-green-100g": 780,
        "tea-pot-glass": 2895,
    }
)
# How many in a hundred lines; the rest are ordinary orders.
SHARES: Mapping[str, float] = MappingProxyType(
    {
        "flaky": 5.0,  # the first payment fails, the second succeeds
        "outage": 2.0,  # the payment fails until the provider is repaired
        "broken": 0.4,  # cut off in the middle
        "incomplete": 0.3,  # a field is missing
        "mistyped": 0.3,  # a field has the wrong type
        "free": 0.7,  # nothing to pay
        "negative": 0.3,  # a refund that was entered as an order
        "late": 0.5,  # its time to pay is over
    }
)
START = datetime(2026, 3, 2, 7, 0, tzinfo=UTC)


def generate(count: int, seed: int) -> tuple[list[bytes], dict[str, int]]:
    """The lines, and the expectations."""
    rng = random.Random(seed)  # noqa: S311  # no secret
    kinds = [kind for kind, share in SHARES.items() for _ in range(max(1, round(count * share / 100)))]
    kinds += ["plain"] * (count - len(kinds))
    rng.shuffle(kinds)
    at = START
    lines = []
    for number, kind in enumerate(kinds, start=1):
        at += timedelta(seconds=rng.randint(1, 40))
        lines.append(_line(_order(rng, number, at), kind, rng))
    n = Counter(kinds)
    return lines, {
        "sent": count,
        "invalid": n["broken"] + n["incomplete"] + n["mistyped"],
        "discarded": n["free"],
        "retried": n["flaky"] + n["outage"],
        "failed": n["outage"],  # dead letters, by what they died of
        "refused": n["negative"],
        "expired": n["late"],
        "charged": n["plain"] + n["flaky"] + n["outage"],  # at the end, when the provider is repaired
    }


def _order(rng: random.Random, number: int, at: datetime) -> dict[str, Any]:
    skus = rng.sample(sorted(CATALOGUE), k=rng.randint(1, 4))
    items = [{"sku": sku, "quantity": rng.randint(1, 5), "price": CATALOGUE[sku]} for sku in skus]
    return {
        "id": f"o-{number:05}",
        "customer": f"c-{int(rng.triangular(1, 400, 40)):04}",  # some buy often
        "items": items,
        "total": sum(item["quantity"] * item["price"] for item in items),  # type: ignore[operator]
        "currency": rng.choice(("EUR", "EUR", "EUR", "GBP", "SEK")),
        "payment": f"card-{rng.getrandbits(32):08x}",
        "created_at": at.isoformat().replace("+00:00", "Z"),
    }


def _line(order: dict[str, Any], kind: str, rng: random.Random) -> bytes:
    changes: dict[str, Callable[[], object]] = {
        "flaky": lambda: order.update(payment=f"flaky-{order['payment']}"),
        "outage": lambda: order.update(payment=f"outage-{order['payment']}"),
        "incomplete": lambda: order.pop(rng.choice(("id", "customer", "total"))),
        "mistyped": lambda: order.update(rng.choice(({"total": "a lot"}, {"items": 3}, {"created_at": "yesterday"}))),
        "free": lambda: order.update(total=0),
        "negative": lambda: order.update(total=-order["total"]),
        "late": lambda: order.update(pay_before=order["created_at"]),
    }
    changes.get(kind, lambda: None)()
    line = json.dumps(order, separators=(",", ":")).encode()
    return line[: rng.randint(len(line) // 3, len(line) - 2)] if kind == "broken" else line


def write(path: Path, count: int, seed: int) -> None:
    lines, expected = generate(count, seed)
    path.write_bytes(b"\n".join(lines) + b"\n")
    expectations(path).write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")


def expectations(path: Path) -> Path:
    """Where the expectations for a file of orders stand."""
    return path.with_suffix(".expected.json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.orders.generate", description=__doc__)
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    write(options.out, options.count, options.seed)


if __name__ == "__main__":
    main()
