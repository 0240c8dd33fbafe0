"""The judgement: a pure function from a history to a verdict.

| finding | the promise that was broken |
|---|---|
| lost | a confirmed send was never handled, is in no dead-letter or invalid-message channel, and is not stored any more |
| left | the same, but it is still stored: nothing is lost, yet the drain said it was done |
| unexpected | something was handled that nobody has sent |
| resurrected | something was handled whose send had certainly failed |
| order | of two messages of one key, of which the first was confirmed before the second was sent, the second was handled first |
| overlap | two messages of one key were handled at the same time, with no fault near |
| duplicate | a message was handled with success twice, with no fault in between that explains it |
| attempt_back | the attempt went down within a process |
| attempt_high | the attempt was higher than the failures before it allow |
| reply | a requester got a reply to a request that was not its own |
| came_back | a message was delivered again after its settlement had been confirmed |
| no_bite | a fault was injected and nothing shows that it had an effect |

What is not known is never a finding: an `unknown` send may be handled or not (`recovered` counts those that were), an `unknown`
settlement may be repeated. But a run of which hardly anything is known proves nothing, and is `inconclusive`; one that was not
drained to its end, or whose files don't fit together, is `invalid`. Neither is a pass.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from .record import Kind, Operation

SECOND = 1_000_000_000

# Where a value was seen at the end, in the `detail` of a `look`: in our channels, or by a client that is not ours.
DEAD = "dead"
INVALID = "invalid"
STORED = "stored"

Status = Literal["kept", "broken", "inconclusive", "invalid"]


@dataclass(frozen=True, slots=True)
class Expected:
    """What this broker and these channels promise. `groups`: topic -> its subscriptions; a channel not named is a queue.

    `ordered`: channels with order by key; `settle_confirmed`: a settlement that returned is on the broker; `echo`: seconds
    after the end of a fault in which its consequences may still show (leases that have to run out); `least`: confirmed
    sends without which a run proves nothing.
    """

    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ordered: frozenset[str] = frozenset()
    settle_confirmed: bool = True
    echo: float = 60.0
    least: int = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken promise. `at`: when it showed, in the history's nanoseconds."""

    check: str
    value: str
    why: str
    at: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`status` is `kept` only when there is no finding, enough is known, and the drain came to its end."""

    status: Status
    findings: tuple[Finding, ...]
    counts: Mapping[str, int]
    why: str = ""


@dataclass(slots=True)
class _Call:
    """An operation with both its lines. `end` is None where only the invocation is there: nobody knows when it ended."""

    begun: Operation
    kind: Kind = "unknown"
    end: int | None = None
    detail: str = ""


def check(history: Iterable[Operation], expected: Expected | None = None) -> Verdict:
    """Never raises for what a history says: what doesn't fit together makes it `invalid`."""
    promised = expected or Expected()
    calls, broken = _pair(history)
    if broken:
        return Verdict("invalid", (), {}, broken)
    by: dict[str, list[_Call]] = defaultdict(list)
    for call in calls:
        by[call.begun.what].append(call)
    run = _Run(by, promised)
    findings = [*run.losses(), *run.intruders(), *run.repetitions(), *run.order(), *run.overlaps(), *run.attempts()]
    findings += [*run.replies(), *run.faults()]
    counts = run.counts(findings)
    drains = by["drain"]
    if not drains or drains[-1].kind != "ok":
        why = "the drain did not come to its end" if drains else "nothing was drained"
        return Verdict("invalid", tuple(findings), counts, f"{why}: what is missing may only be late")
    if counts["confirmed"] < promised.least:
        why = f"{counts['confirmed']} of {counts['sent']} sends are known to have happened; {promised.least} are needed"
        # What is known to be broken stays broken, however little else is known.
        return Verdict("broken" if findings else "inconclusive", tuple(findings), counts, why)
    return Verdict("broken" if findings else "kept", tuple(findings), counts)


def _pair(history: Iterable[Operation]) -> tuple[list[_Call], str]:
    calls: dict[tuple[str, int], _Call] = {}
    for operation in history:
        name = (operation.process, operation.call)
        call = calls.get(name)
        if operation.kind == "invoke":
            if call is not None:
                return [], f"process {operation.process} has invoked call {operation.call} twice"
            calls[name] = _Call(operation)
        elif call is None and operation.what in {"look", "drain"}:
            calls[name] = _Call(operation, operation.kind, operation.at, operation.detail)
        elif call is None or call.end is not None:
            return [], f"process {operation.process} has ended call {operation.call} without having invoked it"
        else:
            call.kind, call.end, call.detail = operation.kind, operation.at, operation.detail
    return list(calls.values()), ""


class _Run:
    """The calls, sorted by what the checks ask for."""

    def __init__(self, by: Mapping[str, list[_Call]], promised: Expected) -> None:
        self.promised = promised
        self.requests = by["request"]
        self.sends: dict[str, list[_Call]] = defaultdict(list)
        for call in (*by["send"], *by["request"]):
            self.sends[call.begun.value].append(call)
        # Handlings of one message in one group, in the order in which they began.
        self.handled: dict[tuple[str, str, str], list[_Call]] = defaultdict(list)
        for call in by["handle"]:
            self.handled[call.begun.value, call.begun.place, call.begun.group].append(call)
        for tries in self.handled.values():
            tries.sort(key=lambda call: call.begun.at)
        self.settled: dict[tuple[str, str, str], list[_Call]] = defaultdict(list)
        for call in by["settle"]:
            self.settled[call.begun.value, call.begun.place, call.begun.group].append(call)
        self.seen: dict[str, set[tuple[str, str]]] = defaultdict(set)
        for call in by["look"]:
            self.seen[call.begun.value].add((call.detail, call.begun.group))
        self.injected = by["fault"]
        self._windows = _merged(
            (call.begun.at, (call.end if call.end is not None else call.begun.at) + int(promised.echo * SECOND))
            for call in by["fault"]
        )
        self._starts = [start for start, _ in self._windows]
        self._ends = [end for _, end in self._windows]

    def faulty(self, since: int, until: int) -> bool:
        """A fault, or what it leaves behind, touches this time."""
        return bisect_right(self._starts, until) > bisect_left(self._ends, since)

    def groups(self, place: str) -> Sequence[str]:
        return self.promised.groups.get(place, ("",))

    def losses(self) -> Iterable[Finding]:
        for value, sends in self.sends.items():
            sure = next((call for call in sends if call.kind == "ok"), None)
            if sure is None:
                continue
            place = sure.begun.place
            for group in self.groups(place):
                if any(call.kind == "ok" for call in self.handled.get((value, place, group), ())):
                    continue
                where = {detail for detail, at in self.seen.get(value, ()) if at in {group, ""}}
                if where & {DEAD, INVALID}:
                    continue
                name = f"{place}.{group}" if group else place
                if STORED in where:
                    yield Finding("left", value, f"{name}: still on the broker after the drain, the consumer's doing")
                elif (value, place, group) in self.handled:
                    yield Finding(
                        "lost", value, f"{name}: delivered, never handled with success, and gone: the consumer's doing"
                    )
                else:
                    yield Finding(
                        "lost",
                        value,
                        f"{name}: never delivered and not on the broker: lost by the sender or the broker",
                    )

    def intruders(self) -> Iterable[Finding]:
        for (value, place, _), tries in self.handled.items():
            first = tries[0].begun
            sends = [call for call in self.sends.get(value, ()) if call.begun.place == place]
            if not sends:
                yield Finding("unexpected", value, f"{place}: handled by {first.process}, sent by nobody", first.at)
            elif all(call.kind == "fail" for call in sends):
                why = f"{place}: handled by {first.process} although sending it had failed with {sends[0].detail}"
                yield Finding("resurrected", value, why, first.at)

    def repetitions(self) -> Iterable[Finding]:
        """Handled with success more than once, and delivered after a confirmed settlement."""
        for (value, place, group), tries in self.handled.items():
            if len(tries) == 1:
                continue
            if not self.one_copy(value):
                continue
            done = [call for call in tries if call.kind == "ok"]
            for earlier, later in pairwise(done):
                if not self.faulty(earlier.begun.at, later.begun.at):
                    why = (
                        f"{place}: handled by {earlier.begun.process} and by {later.begun.process}, with no fault near"
                    )
                    yield Finding("duplicate", value, why, later.begun.at)
            if self.promised.settle_confirmed:
                yield from self._returns(value, tries, self.settled.get((value, place, group), ()))

    def _returns(self, value: str, tries: Sequence[_Call], settles: Iterable[_Call]) -> Iterable[Finding]:
        ends = [call.end for call in settles if call.kind == "ok" and call.end is not None]
        # A retry that was moved while something was broken may have left two copies, of which one was settled.
        if not ends or self.faulty(tries[0].begun.at, min(ends)):
            return
        late = next((call for call in tries if call.begun.at > min(ends)), None)
        if late is not None:
            why = f"{late.begun.place}: delivered to {late.begun.process} after its settlement had been confirmed"
            yield Finding("came_back", value, why, late.begun.at)

    def one_copy(self, value: str) -> bool:
        """Sent once and in calm. In a fault the publisher may have sent it again, and both copies may be on the broker."""
        sends = self.sends.get(value, ())
        return len(sends) == 1 and sends[0].end is not None and not self.faulty(sends[0].begun.at, sends[0].end)

    def order(self) -> Iterable[Finding]:
        """Among first deliveries: nobody waited for a message that was confirmed before this one was sent."""
        first: dict[tuple[str, str, str, str], list[tuple[int, _Call]]] = defaultdict(list)
        for (value, place, group), tries in self.handled.items():
            sends = self.sends.get(value, ())
            if place in self.promised.ordered and len(sends) == 1 and sends[0].kind == "ok":
                begun = sends[0].begun
                first[place, group, begun.key, begun.process].append((tries[0].begun.at, sends[0]))
        for (place, group, key, _), firsts in first.items():
            newest = 0
            for at, send in sorted(firsts, key=lambda one: one[0]):
                if send.end is not None and send.end < newest:
                    name = f"{place}.{group}" if group else place
                    yield Finding(
                        "order", send.begun.value, f"{name}, key {key!r}: a later message was handled first", at
                    )
                newest = max(newest, send.begun.at)

    def overlaps(self) -> Iterable[Finding]:
        """Of one key only one is handled at a time. A consumer whose lease was lost in a fault can't know it, and is excused."""
        lanes: dict[tuple[str, str, str], list[_Call]] = defaultdict(list)
        for (_, place, group), tries in self.handled.items():
            if place in self.promised.ordered:
                for call in tries:
                    if call.end is not None:
                        lanes[place, group, call.begun.key].append(call)
        for (place, _, key), lane in lanes.items():
            lane.sort(key=lambda call: call.begun.at)
            longest = lane[0]
            for call in lane[1:]:
                end = longest.end or 0
                if call.begun.at < end and not self.faulty(longest.begun.at, call.begun.at):
                    why = f"{place}, key {key!r}: began while {longest.begun.value} was being handled"
                    yield Finding("overlap", call.begun.value, why, call.begun.at)
                if (call.end or 0) > end:
                    longest = call

    def attempts(self) -> Iterable[Finding]:
        for (value, place, _), tries in self.handled.items():
            last: dict[str, Operation] = {}
            for call in tries:
                told = call.begun.attempt
                if not told:
                    continue
                before = last.get(call.begun.process)
                # Failures between two durable steps may be forgotten when a link or the broker dies, never else.
                if before is not None and told < before.attempt and not self.faulty(before.at, call.begun.at):
                    why = f"{place}: attempt {told} after attempt {before.attempt} in {call.begun.process}"
                    yield Finding("attempt_back", value, why, call.begun.at)
                last[call.begun.process] = call.begun
                # One that never ended may have failed before it could say so.
                failed = sum(other.kind != "ok" and other.begun.at < call.begun.at for other in tries)
                if told > failed + 1:
                    why = f"{place}: attempt {told} in {call.begun.process} after {failed} failures"
                    yield Finding("attempt_high", value, why, call.begun.at)

    def replies(self) -> Iterable[Finding]:
        for call in self.requests:
            if call.kind == "ok" and call.detail != call.begun.value:
                why = f"{call.begun.process} was answered with the reply to {call.detail!r}"
                yield Finding("reply", call.begun.value, why, call.end or 0)

    def faults(self) -> Iterable[Finding]:
        for call in self.injected:
            if call.kind != "ok":
                why = f"{call.begun.value}: {call.detail or 'its end is not recorded'}"
                yield Finding("no_bite", call.begun.value, why, call.begun.at)

    def counts(self, findings: Iterable[Finding]) -> dict[str, int]:
        """Figures of the run; `duplicates` counts the explained ones too."""
        kinds = Counter(call.kind for sends in self.sends.values() for call in sends)
        done = [sum(call.kind == "ok" for call in tries) for tries in self.handled.values()]
        arrived = {value for value, _, _ in self.handled}
        recovered = sum(
            value in arrived and all(call.kind == "unknown" for call in sends) for value, sends in self.sends.items()
        )
        dead = {value for value, where in self.seen.items() if any(detail == DEAD for detail, _ in where)}
        return {
            "sent": sum(kinds.values()),
            "confirmed": kinds["ok"],
            "failed": kinds["fail"],
            "unknown": kinds["unknown"],
            "recovered": recovered,
            "handled": sum(count > 0 for count in done),
            "duplicates": sum(count - 1 for count in done if count > 1),
            "unexplained_duplicates": sum(finding.check == "duplicate" for finding in findings),
            "dead_letters": len(dead),
            "faults": len(self.injected),
            "findings": sum(1 for _ in findings),
        }


def _merged(windows: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Windows that don't overlap, in order."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(windows):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
