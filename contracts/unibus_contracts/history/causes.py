"""Why a message may come again: what its consumer still held when it lost it, and what was sent twice.

Nothing is excused for being near a fault. A repetition needs a cause in the history of that very message or of the process
that had it in hand:

- `killed`: the process that held it has said no last word.
- `link`, `lease`: its link broke, or the delivery was taken away, before its settlement was confirmed.
- `unsettled`: its settlement was tried, and not confirmed; or, where the broker confirms none, its adapter has said that it
  could not tell the broker before it had to give the message's partition up.
- `copies`: it was sent again after a send of which nobody knows the outcome; or a copy for its retry was confirmed and the
  original not settled; or who should have sent that copy was killed.
- `stalled`: its process stood still while another one got it and settled it, went on with what it had in hand, and found its link or
  the delivery gone right after, or could not settle it.
- `ack`: settled, where the broker confirms no settlement, and the link broke before the broker is known to have seen it.

Two times are needed where nothing better can be known. `NOTICE`: a broker may see a link broken, and hand a message to another
consumer, before the process at this end of it notices. `Expected.settle_window`: how long before a break, or before a fault that
led to one, an unconfirmed settlement may have been on its way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .record import Kind

SECOND = 1_000_000_000
NOTICE = 5 * SECOND

Name = tuple[str, str, str]  # value, channel, group


@dataclass(slots=True)
class Call:
    """An operation with both its lines. `end` is None where only the invocation is there: nobody knows when it ended."""

    process: str
    at: int
    value: str
    place: str
    group: str
    key: str
    attempt: int
    kind: Kind = "unknown"
    end: int | None = None
    detail: str = ""
    number: int = 0  # among the calls of its process: the order in which they were made
    request: bool = False  # its outcome is that of the reply


@dataclass(slots=True)
class Settled:
    """One settlement of one delivery. `end` is None unless it was confirmed. `word`: accepted, moved, released."""

    process: str
    at: int
    end: int | None
    word: str


@dataclass(slots=True)
class Causes:
    """Gathered from a history; asked by its checks."""

    settle_confirmed: bool
    window: int  # nanoseconds
    settled: dict[Name, list[Settled]] = field(default_factory=lambda: defaultdict(list))
    taken: dict[tuple[str, Name], list[int]] = field(default_factory=lambda: defaultdict(list))
    uncommitted: dict[tuple[str, Name], list[int]] = field(default_factory=lambda: defaultdict(list))
    copied: dict[Name, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
    tries: dict[tuple[str, str], int] = field(
        default_factory=lambda: defaultdict(int)
    )  # value and group: not confirmed
    breaks: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # of a process's link
    last: dict[str, int] = field(default_factory=dict)  # when each process wrote its last line
    ended: set[str] = field(default_factory=set)  # those that said bye
    faults: list[tuple[int, int]] = field(default_factory=list)
    stalls: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))  # of a process

    def note(self, call: Call, what: str) -> None:
        """Take in what an adapter was told. Values are many, with blanks between them."""
        if what == "lost" and not call.value:
            self.breaks[call.process].append(call.at)
            return
        for value in call.value.split():
            name = value, call.place, call.group
            if what == "lost":
                self.taken[call.process, name].append(call.at)
            elif what == "uncommitted":
                self.uncommitted[call.process, name].append(call.at)
            elif what == "copied":
                self.copied[name].append((call.process, call.at))
            elif what == "try":
                self.tries[value, call.group] += 1

    def settle(self, call: Call, word: str, failed: Sequence[str]) -> None:
        """`failed`: those of its values that were not confirmed; without any, `call.kind` is true of all."""
        for value in call.value.split():
            sure = value not in failed if failed else call.kind == "ok"
            self.settled[value, call.place, call.group].append(
                Settled(call.process, call.at, call.end if sure else None, word)
            )

    def prepare(self) -> None:
        """Once all is taken in."""
        for times in (*self.breaks.values(), *self.taken.values(), *self.uncommitted.values()):
            times.sort()

    def given_up(self, call: Call, name: Name, by: int) -> str | None:
        """Why the delivery that `call` handled was not its process's any more, as a broker saw it by the time `by`; or None."""
        process = call.process
        mine = [s for s in self.settled.get(name, ()) if s.process == process and s.at >= call.at]
        done = min((s.end for s in mine if s.end is not None), default=None)
        limit = by + NOTICE if done is None else min(done, by + NOTICE)
        if _any(self.taken.get((process, name), ()), call.at, limit):
            return "lease"
        if _any(self.breaks.get(process, ()), call.at, limit):
            return "link"
        if any(s.end is None and s.at <= limit for s in mine):
            return "unsettled"
        if done is None and self._killed(process) and self.last.get(process, 0) <= by + NOTICE:
            return "killed"
        return None

    def released(self, call: Call, name: Name, by: int) -> bool:
        """Did its process give the delivery back after `call`, and before that time? What it knew of failures went with it."""
        return any(
            (s.process, s.word) == (call.process, "released") and call.at <= s.at <= by
            for s in self.settled.get(name, ())
        )

    def copies(self, name: Name, sends: Iterable[Call], tries: Iterable[Call]) -> bool:
        """May there be two of it? `tries`: its handlings."""
        value, _, group = name
        # A send that was repeated was tried at least twice; of the last try of one that failed nothing more came. A request
        # without a reply may have been sent for certain all the same.
        sure = sum(call.kind == "ok" or call.request for call in sends)
        tried = self.tries.get((value, ""), 0)
        if tried + sure > 1 or (group and self.tries.get((value, group), 0) > 0):
            return True
        # Who was killed after a failure may have sent the copy, and have heard nothing of it any more.
        if any(call.kind != "ok" and self._killed(call.process) for call in tries):
            return True
        copied = sorted(self.copied.get(name, ()), key=lambda copy: copy[1])
        for n, (process, at) in enumerate(copied):
            failed = max((call.at for call in tries if call.process == process and call.at <= at), default=at)
            again = next((later for other, later in copied[n + 1 :] if other == process), None)
            if self._beside(name, process, (failed, at, again)):
                return True
        return False

    def _beside(self, name: Name, process: str, times: tuple[int, int, int | None]) -> bool:
        """A copy was confirmed. Was the original not settled, or not for certain? `times`: when the handler that failed had begun, when the
        copy was confirmed, and when the process copied it once more: what it settles after that it settles for that copy.
        """
        failed, at, again = times
        mine = [s for s in self.settled.get(name, ()) if (s.process, s.word) == (process, "moved") and s.at >= at]
        moved = [s for s in mine if again is None or s.at < again]
        if moved:
            first = min(moved, key=lambda s: s.at)
            return first.end is None or (not self.settle_confirmed and self.in_doubt(first, name, None))
        # The link may have broken while the copy was on its way, and long before it was confirmed.
        lost = _any(self.breaks.get(process, ()), failed, again) or _any(
            self.taken.get((process, name), ()), failed, again
        )
        return lost or self._killed(process)

    def _killed(self, process: str) -> bool:
        return process not in self.ended

    def finished(self, name: Name, before: int) -> Settled | None:
        """The first settlement after which the broker must not hand it out again, if it was confirmed before that time."""
        ends = [s for s in self.settled.get(name, ()) if s.word == "accepted" and s.end is not None and s.end < before]
        return min(ends, key=lambda s: s.end or 0, default=None)

    def never_told(self, settled: Settled, name: Name, by: int) -> bool:
        """Its process said of it later, and before that time, that the broker does not know."""
        return _any(self.uncommitted.get((settled.process, name), ()), settled.at, by + NOTICE)

    def held_unaware(self, call: Call, other: int, name: Name) -> str | None:
        """Why `call` began with a delivery that the broker had given to another, who was at work on it at the time `other`.

        Its process could not notice before: it stood still then, or a fault was at its link. It noticed right after, or was killed.
        """
        lost = (self.taken.get((call.process, name), ()), self.breaks.get(call.process, ()))
        refused = [s.at for s in self.settled.get(name, ()) if s.process == call.process and s.end is None]
        noticed = any(_any(times, call.at, call.at + NOTICE) for times in (*lost, refused))
        killed = self._killed(call.process) and self.last.get(call.process, 0) <= call.at + NOTICE
        for begun, over in self.stalls[call.process]:
            if begun <= other <= over and begun <= call.at <= over + NOTICE and (noticed or killed):
                return "stalled"
        # What was settled before the fault has to stay settled, whatever happens to links afterwards.
        if noticed and any(begun <= other and begun <= call.at <= end + NOTICE for begun, end in self.faults):
            return "link"
        return None

    def in_doubt(self, settled: Settled, name: Name, by: int | None) -> bool:
        """Settled as far as its process knows; has the broker seen it? Only asked where it confirms no settlement."""
        assert settled.end is not None
        breaks = [*self.breaks.get(settled.process, ()), *self.taken.get((settled.process, name), ())]
        if self._killed(settled.process):
            breaks.append(self.last.get(settled.process, 0))
        until = settled.end + self.window
        for at in sorted(breaks):
            if settled.at <= at and (by is None or at <= by + NOTICE):
                held = any(begun <= until and at <= end + NOTICE for begun, end in self.faults if end >= settled.at)
                return at <= until or held
        return False


def _any(times: Sequence[int], since: int, until: int | None) -> bool:
    """Is one of the times, which are in order, between these?"""
    at = bisect_left(times, since)
    return at < len(times) and (until is None or times[at] <= until)
