"""The judgement: a pure function from a history to a verdict.

| finding | the promise that was broken |
|---|---|
| lost | a confirmed send was never handled, is in no dead-letter or invalid-message channel, and is not stored any more |
| left | the same, but it is still stored: nothing is lost, yet the drain said it was done |
| unexpected | something was handled that nobody has sent |
| resurrected | something was handled whose send had certainly failed |
| order | of two messages of one key and one sender, both confirmed, the one that was sent later was handled first |
| overlap | two messages of one key were handled at the same time, and neither consumer had lost its delivery |
| duplicate | a message was handled with success twice, and nothing in its history says why (`causes`) |
| attempt_back | the attempt went down within a process that had not lost the delivery |
| attempt_high | the attempt was higher than the failures before it allow |
| reply | a requester got a reply to a request that was not its own |
| innocent | it is a dead letter, and fewer of its runs had failed than the policy wants (`Expected.runs`) |
| came_back | a message was delivered again after its settlement had been confirmed |
| no_bite | a fault was injected and nothing shows that it had an effect |

What is not known is never a finding: an `unknown` send may be handled or not (`recovered` counts those that were), an `unknown`
settlement may be repeated. But a run of which hardly anything is known proves nothing, and is `inconclusive`; one that was not
drained to its end, or whose files don't fit together, is `invalid`. Neither is a pass.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from sys import intern
from typing import Literal

from .causes import SECOND, Call, Causes, Name
from .record import History, Operation, What

# Where a value was seen at the end, in the `detail` of a `look`: in our channels, or by a client that is not ours.
DEAD = "dead"
INVALID = "invalid"
STORED = "stored"
LOGGED = "logged"  # the broker had it once: it stands in a log that keeps what was read

Status = Literal["kept", "broken", "inconclusive", "invalid"]


@dataclass(frozen=True, slots=True)
class Expected:
    """What this broker and these channels promise. `groups`: topic -> its subscriptions; a channel not named is a queue.

    `ordered`: channels with order by key; `settle_confirmed`: a settlement that returned is on the broker; where it is not,
    `settle_window`: seconds until the broker has seen it, unless something is broken; `runs`: of a message that must have
    failed, or have been broken off, before it is a dead letter; `least`: confirmed sends without which a run proves nothing.
    """

    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ordered: frozenset[str] = frozenset()
    settle_confirmed: bool = True
    settle_window: float = 1.0
    runs: int = 1
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


def check(history: Iterable[Operation], expected: Expected | None = None) -> Verdict:
    """Reads the history twice. Never raises for what it says: what doesn't fit together makes it `invalid`."""
    promised = expected or Expected()
    run = _Run(promised)
    if broken := run.take(history):
        return Verdict("invalid", (), {}, broken)
    run.look_into(history)
    findings = [*run.losses(), *run.intruders(), *run.repetitions(), *run.order(), *run.overlaps(), *run.attempts()]
    findings += [*run.innocents(), *run.replies(), *run.faults()]
    counts = run.counts(findings)
    if run.drained != "ok":
        why = "the drain did not come to its end" if run.drained else "nothing was drained"
        return Verdict("invalid", tuple(findings), counts, f"{why}: what is missing may only be late")
    if counts["confirmed"] < promised.least:
        why = f"{counts['confirmed']} of {counts['sent']} sends are known to have happened; {promised.least} are needed"
        # What is known to be broken stays broken, however little else is known.
        return Verdict("broken" if findings else "inconclusive", tuple(findings), counts, why)
    return Verdict("broken" if findings else "kept", tuple(findings), counts)


_OF_ADAPTERS: tuple[What, ...] = ("settle", "settled", "uncommitted", "try", "copied", "lost")
_CALLS = {"send", "request", "handle", "fault", "drain"}


class _Run:
    """The calls, sorted by what the checks ask for."""

    def __init__(self, promised: Expected) -> None:
        self.promised = promised
        self.requests: list[Call] = []
        self.sends: dict[str, list[Call]] = defaultdict(list)
        # Handlings of one message in one group, in the order in which they began.
        self.handled: dict[Name, list[Call]] = defaultdict(list)
        self.seen: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self.injected: list[Call] = []
        self.drained = ""
        self.causes = Causes(promised.settle_confirmed, int(promised.settle_window * SECOND))
        self.explained: Counter[str] = Counter()

    def take(self, history: Iterable[Operation]) -> str:
        """First reading: all but what adapters were told of single messages. What doesn't fit together, or nothing."""
        open_calls: dict[tuple[str, int], Call | None] = {}
        known: dict[str, bytearray] = defaultdict(bytearray)  # the calls of a process; one byte each
        values: dict[str, str] = {}
        last = self.causes.last
        for operation in history:
            process, number = intern(operation.process), operation.call
            last[process] = max(operation.at, last.get(process, 0))
            calls = known[process]
            if len(calls) <= number:
                calls.extend(bytes(max(64, number + 1 - len(calls))))
            if operation.kind == "invoke":
                if calls[number]:
                    return f"process {process} has invoked call {number} twice"
                calls[number] = 1
                call = None
                if operation.what in _CALLS:
                    value = values.setdefault(operation.value, operation.value)
                    call = _call(operation, process, value)
                    self._sort(operation.what, call)
                open_calls[process, number] = call
            elif (process, number) in open_calls:
                call = open_calls.pop((process, number))
                if call is not None:
                    call.kind, call.end, call.detail = operation.kind, operation.at, operation.detail
                    if operation.what == "drain":
                        self.drained = operation.kind
            elif operation.what in _CALLS - {"drain"} or calls[number]:
                return f"process {process} has ended call {number} without having invoked it"
            else:
                calls[number] = 1
                self._note(operation, process)
        for tries in self.handled.values():
            if len(tries) > 1:
                tries.sort(key=lambda call: call.at)
        self.causes.faults = [(call.at, call.end or call.at) for call in self.injected]
        return ""

    def _sort(self, what: str, call: Call) -> None:
        if what == "handle":
            self.handled[call.value, call.place, call.group].append(call)
        elif what in {"send", "request"}:
            self.sends[call.value].append(call)
            if what == "request":
                call.request = True
                self.requests.append(call)
        elif what == "fault":
            self.injected.append(call)
        else:
            self.drained = "unknown"

    def _note(self, operation: Operation, process: str) -> None:
        if operation.what == "look":
            self.seen[operation.value].add((operation.detail, operation.group))
        elif operation.what == "stalled":
            begun = operation.at - int(float(operation.detail) * SECOND)
            self.causes.stalls[process].append((begun, operation.at))
        elif operation.what == "bye":
            self.causes.ended.add(process)
        elif operation.what == "drain":
            self.drained = operation.kind

    def look_into(self, history: Iterable[Operation]) -> None:
        """Second reading: what became of the deliveries of which something is to be explained. Most of them need nothing."""
        wanted = {name[0] for name, tries in self.handled.items() if len(tries) > 1}
        for one, other, _ in self.overlapping():
            wanted |= {one.value, other.value}
        for place in self.lost():
            wanted.add(place[0])
        settles: dict[tuple[str, int], Call] = {}
        for operation in history.of(*_OF_ADAPTERS) if isinstance(history, History) else history:
            what = operation.what
            if what not in _OF_ADAPTERS:
                continue
            number = operation.process, operation.call
            if what in {"settle", "settled"} and operation.kind != "invoke":
                if (call := settles.pop(number, None)) is None:
                    continue
                call.kind, call.end = operation.kind, operation.at
                word = "accepted" if what == "settle" else call.detail
                self.causes.settle(call, word, operation.value.split() if operation.kind == "unknown" else ())
                continue
            some = [value for value in operation.value.split() if value in wanted]
            if some or (what == "lost" and not operation.value):
                call = _call(operation, intern(operation.process), " ".join(some))
                call.detail = operation.detail
                if what in {"settle", "settled"}:
                    settles[number] = call
                else:
                    self.causes.note(call, what)
        for call in settles.values():  # begun, and nobody knows how they ended
            self.causes.settle(call, call.detail or "accepted", call.value.split())
        self.causes.prepare()

    def groups(self, place: str) -> Sequence[str]:
        return self.promised.groups.get(place, ("",))

    def lost(self) -> Iterable[Name]:
        """What was confirmed, and neither handled with success nor seen where it may stay."""
        for value, sends in self.sends.items():
            sure = next((call for call in sends if call.kind == "ok"), None)
            if sure is None:
                continue
            for group in self.groups(sure.place):
                name = value, sure.place, group
                if any(call.kind == "ok" for call in self.handled.get(name, ())):
                    continue
                where = {detail for detail, at in self.seen.get(value, ()) if at in {group, ""}}
                if not where & {DEAD, INVALID}:
                    yield name

    def losses(self) -> Iterable[Finding]:
        for value, place, group in self.lost():
            name = f"{place}.{group}" if group else place
            where = {detail for detail, at in self.seen.get(value, ()) if at in {group, ""}}
            settled = [s for s in self.causes.settled.get((value, place, group), ()) if s.end is not None]
            if STORED in where:
                yield Finding("left", value, f"{name}: still on the broker after the drain, the consumer's doing")
            elif settled:
                how = f"{settled[0].word} by {settled[0].process}"
                yield Finding(
                    "lost", value, f"{name}: {how}, never handled with success, and gone: the consumer's doing"
                )
            elif (value, place, group) in self.handled:
                why = (
                    f"{name}: delivered, never settled, and gone: lost by the broker, or settled by one that was killed"
                )
                yield Finding("lost", value, why)
            elif LOGGED in where:
                yield Finding("lost", value, f"{name}: the broker has had it, and nobody got it: the consumer's doing")
            else:
                why = f"{name}: never delivered and not on the broker: lost by the sender or the broker"
                yield Finding("lost", value, why)

    def intruders(self) -> Iterable[Finding]:
        for (value, place, _), tries in self.handled.items():
            first = tries[0]
            sends = [call for call in self.sends.get(value, ()) if call.place == place]
            if not sends:
                yield Finding("unexpected", value, f"{place}: handled by {first.process}, sent by nobody", first.at)
            elif all(call.kind == "fail" for call in sends):
                why = f"{place}: handled by {first.process} although sending it had failed with {sends[0].detail}"
                yield Finding("resurrected", value, why, first.at)

    def repetitions(self) -> Iterable[Finding]:
        """Handled with success more than once without a cause, or delivered after a confirmed settlement."""
        for name, tries in self.handled.items():
            if len(tries) == 1:
                continue
            value, place, _ = name
            done = [call for call in tries if call.kind == "ok"]
            twice = self.causes.copies(name, self.sends.get(value, ()), tries)
            if twice:
                self.explained["copies"] += max(0, len(done) - 1)
                continue
            later = {id(call): before for before, call in pairwise(done)}
            for call in tries[1:]:
                before = later.get(id(call))
                over = self.causes.finished(name, call.at)
                if over is not None:
                    if not self.promised.settle_confirmed and self.causes.in_doubt(over, name, call.at):
                        self.explained["ack"] += before is not None
                    elif not self.promised.settle_confirmed and self.causes.never_told(over, name, call.at):
                        self.explained["unsettled"] += before is not None
                    elif call.process != over.process and (
                        cause := self.causes.held_unaware(call, over.end or over.at, name)
                    ):
                        self.explained[cause] += before is not None
                    else:
                        why = f"{place}: delivered to {call.process} after {over.process} had settled it"
                        yield Finding("came_back", value, why, call.at)
                        break
                elif before is not None:
                    cause = self.causes.given_up(before, name, call.at)
                    if cause is None and call.process != before.process:
                        cause = self.causes.held_unaware(call, before.end or before.at, name)
                    if cause is not None:
                        self.explained[cause] += 1
                    else:
                        why = f"{place}: handled by {before.process} and by {call.process}, and nothing says why"
                        yield Finding("duplicate", value, why, call.at)

    def innocents(self) -> Iterable[Finding]:
        """Dead letters whose handler has not failed so often. What a killed process had begun counts: it may have failed."""
        for value, where in self.seen.items():
            sends = self.sends.get(value)
            if not sends:  # nobody's, as `unexpected` says where it was handled
                continue
            place = sends[0].place
            for detail, group in where:
                if detail != DEAD:
                    continue
                runs = [
                    self.handled.get((value, place, each), ()) for each in ([group] if group else self.groups(place))
                ]
                failed = max(sum(call.kind != "ok" for call in tries) for tries in runs)
                if failed < self.promised.runs:
                    name = f"{place}.{group}" if group else place
                    why = f"{name}: a dead letter after {failed} failed runs; {self.promised.runs} are needed"
                    yield Finding("innocent", value, why)

    def order(self) -> Iterable[Finding]:
        """Among first deliveries: those of one key and sender come in the order of the calls, awaited in between or not.

        What was sent again in a fault is no exception: later ones of its key wait for it, or fail with it. Of a send that was
        not confirmed nothing is promised; those around it keep their order.
        """
        first: dict[tuple[str, str, str, str], list[tuple[int, int, str]]] = defaultdict(list)
        for (value, place, group), tries in self.handled.items():
            sends = self.sends.get(value, ())
            if place not in self.promised.ordered or len(sends) != 1:
                continue
            send = sends[0]
            # Without a key there is no order, nor between channels.
            if send.kind == "ok" and send.key and send.place == place:
                first[place, group, send.key, send.process].append((tries[0].at, send.number, value))
        for (place, group, key, _), firsts in first.items():
            newest = 0
            for at, number, value in sorted(firsts):  # begun in the same nanosecond: not known to be out of order
                if number < newest:
                    name = f"{place}.{group}" if group else place
                    yield Finding("order", value, f"{name}, key {key!r}: a later message was handled first", at)
                newest = max(newest, number)

    def overlapping(self) -> Iterable[tuple[Call, Call, Name]]:
        """Pairs of handlings of one key at the same time, and the name of the first."""
        lanes: dict[tuple[str, str, str], list[Call]] = defaultdict(list)
        for (_, place, group), tries in self.handled.items():
            if place in self.promised.ordered:
                for call in tries:
                    if call.end is not None:
                        lanes[place, group, call.key].append(call)
        for (place, group, _), lane in lanes.items():
            lane.sort(key=lambda call: call.at)
            longest = lane[0]
            for call in lane[1:]:
                end = longest.end or 0
                if call.at < end:
                    yield longest, call, (longest.value, place, group)
                if (call.end or 0) > end:
                    longest = call

    def overlaps(self) -> Iterable[Finding]:
        """Of one key only one is handled at a time. A consumer whose delivery was taken away can't know it at once."""
        for longest, call, name in self.overlapping():
            own = call.value, *name[1:]
            if self.causes.given_up(longest, name, call.at) or self.causes.given_up(call, own, call.at):
                continue
            why = f"{call.place}, key {call.key!r}: began while {longest.value} was being handled"
            yield Finding("overlap", call.value, why, call.at)

    def attempts(self) -> Iterable[Finding]:
        for name, tries in self.handled.items():
            value, place, _ = name
            last: dict[str, Call] = {}
            for call in tries:
                told = call.attempt
                if not told:
                    continue
                before = last.get(call.process)
                # Failures between two durable steps may be forgotten with the delivery, never else.
                if before is not None and told < before.attempt:
                    lost = (
                        self.causes.given_up(before, name, call.at)
                        or self.causes.released(before, name, call.at)
                        or self._may_be_undone(before, name, call.at)
                    )
                    if not lost and not self.causes.copies(name, self.sends.get(value, ()), tries):
                        why = f"{place}: attempt {told} after attempt {before.attempt} in {call.process}"
                        yield Finding("attempt_back", value, why, call.at)
                last[call.process] = call
                # One that never ended may have failed before it could say so.
                failed = sum(other.kind != "ok" and other.at < call.at for other in tries)
                if told > failed + 1:
                    why = f"{place}: attempt {told} in {call.process} after {failed} failures"
                    yield Finding("attempt_high", value, why, call.at)

    def _may_be_undone(self, call: Call, name: Name, by: int) -> bool:
        """What its process settled after this handling, where no settlement is confirmed: then it comes as it was before."""
        mine = [s for s in self.causes.settled.get(name, ()) if s.process == call.process and s.at >= call.at]
        return not self.promised.settle_confirmed and any(
            self.causes.in_doubt(settled, name, by) for settled in mine if settled.end is not None
        )

    def replies(self) -> Iterable[Finding]:
        for call in self.requests:
            if call.kind == "ok" and call.detail != call.value:
                why = f"{call.process} was answered with the reply to {call.detail!r}"
                yield Finding("reply", call.value, why, call.end or 0)

    def faults(self) -> Iterable[Finding]:
        for call in self.injected:
            if call.kind != "ok":
                yield Finding(
                    "no_bite", call.value, f"{call.value}: {call.detail or 'its end is not recorded'}", call.at
                )

    def counts(self, findings: Iterable[Finding]) -> dict[str, int]:
        """Figures of the run; `duplicates` counts the explained ones too, `by_…` say by what."""
        kinds = Counter(call.kind for call in chain.from_iterable(self.sends.values()))
        done = [sum(call.kind == "ok" for call in tries) for tries in self.handled.values()]
        arrived = {value for value, _, _ in self.handled}
        recovered = sum(
            value in arrived and all(call.kind == "unknown" for call in sends) for value, sends in self.sends.items()
        )
        dead = {value for value, where in self.seen.items() if any(detail == DEAD for detail, _ in where)}
        broken = Counter(finding.check for finding in findings)
        return {
            "sent": sum(kinds.values()),
            "confirmed": kinds["ok"],
            "failed": kinds["fail"],
            "unknown": kinds["unknown"],
            "recovered": recovered,
            "requests": len(self.requests),
            "answered": sum(call.kind == "ok" for call in self.requests),
            "handled": sum(count > 0 for count in done),
            "lost": broken["lost"],
            "duplicates": sum(count - 1 for count in done if count > 1),
            **{f"by_{cause}": count for cause, count in sorted(self.explained.items()) if count},
            "unexplained_duplicates": broken["duplicate"] + broken["came_back"],
            "dead_letters": len(dead),
            "faults": len(self.injected),
            "findings": sum(broken.values()),
        }


def _call(operation: Operation, process: str, value: str) -> Call:
    o = operation
    return Call(process, o.at, value, intern(o.place), intern(o.group), intern(o.key), o.attempt, number=o.call)
