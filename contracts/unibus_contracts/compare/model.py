"""What is measured, as data: rows, the probes that fill them, and what a probe has found."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .lab import Lab

Points = Mapping[str, Sequence[tuple[float, float]]]  # curve -> x, y
State = Literal["measured", "declared", "refused", "failed", "not run"]

# What a service may do with its channels; `--app` puts the rows that touch these first.
Touch = Literal["queue", "topic", "ordered", "delayed", "priorities", "reply", "retry"]
ALWAYS: tuple[Touch, ...] = ("queue", "topic")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One behaviour. `how`: how it is measured, for people. `feature`: of `unibus.capabilities`, whose level its cells tell.

    `better`: which way its `value` (in `unit`) is better, where there is such a thing. `axes`: of the plot, if it has one.
    """

    id: str
    chapter: str
    title: str
    how: str
    feature: str | None = None
    touches: tuple[Touch, ...] = ALWAYS
    unit: str = ""
    better: Literal["less", "more"] | None = None
    axes: tuple[str, str] | None = None
    logarithmic: bool = False  # the y axis of the plot; x is where it spans decades


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a probe has found for one row: a short text, and the number that `--against` compares, if there is one."""

    text: str
    value: float | None = None
    note: str = ""
    points: Points = field(default_factory=dict)


class NotMeasurable(Exception):
    """This broker, as it is, gives no way to measure it; the text says why. No failure."""


Measure = Callable[["Lab"], Awaitable[Mapping[str, Found]]]


def unmeasurable(why: str) -> Measure:
    """For a row that is there to say why nothing is."""

    async def measure(lab: Lab) -> Mapping[str, Found]:
        raise NotMeasurable(why)

    return measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Fills rows, on one broker at a time. `needs`: the feature without which there is nothing to measure.

    `waits`: it measures seconds, and mostly waits for them, so it runs beside those of other brokers; all others run alone.
    `long`: one of these that waits for so long that the others of its broker run meanwhile.
    """

    name: str
    rows: tuple[Row, ...]
    measure: Measure
    needs: str | None = None
    waits: bool = False
    long: bool = False
    limit: float = 60.0  # seconds, times UNIBUS_TEST_TIMEOUT_FACTOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A row that is not measured: what the adapter says of a feature, and is marked so."""

    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured. Seconds, bytes, messages a second."""

    loads: tuple[int, ...]
    load_seconds: float
    batches: tuple[int, ...]
    bodies: tuple[int, ...]
    flow_seconds: float
    groups: tuple[int, ...]
    publishes: int  # of a round of the fan-out
    delays: tuple[float, ...]
    backoff: float  # of the retry that an ordered queue waits for
    repeats: int
    members: int
    idle_seconds: float
    largest: int  # body that is tried where the adapter declares a larger one or none
    patience: float  # for a broker to notice that a consumer stands still


QUICK = Sizes(
    loads=(50, 200, 500),
    load_seconds=2.5,
    batches=(1, 10, 100, 1000),
    bodies=(100, 1000, 10_000, 100_000),
    flow_seconds=0.8,
    groups=(1, 3, 8),
    publishes=80,
    delays=(0.5, 1, 3),
    backoff=3.0,
    repeats=5,
    members=5,
    idle_seconds=4.0,
    largest=4 * 1024 * 1024,
    patience=90.0,
)
FULL = Sizes(
    loads=(50, 200, 500, 1000, 2000),
    load_seconds=10.0,
    batches=(1, 10, 100, 1000),
    bodies=(100, 1000, 10_000, 100_000, 500_000),
    flow_seconds=5.0,
    groups=(1, 2, 4, 8, 16),
    publishes=200,
    delays=(0.5, 1, 2, 5, 12, 30),
    backoff=3.0,
    repeats=20,
    members=8,
    idle_seconds=20.0,
    largest=32 * 1024 * 1024,
    patience=200.0,
)
