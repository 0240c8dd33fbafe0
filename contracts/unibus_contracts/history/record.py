"""Operations on disk: one file per process, a line of JSON each, written at once.

Every operation has two lines: `invoke` before anything is done, then how it ended. A process that is killed in between leaves
the first line alone, which the checker reads as `unknown`: it may have happened.

- `ok`: the other side has confirmed it.
- `fail`: it has certainly not happened. Only errors that say so for good (`FINAL`) are that.
- `unknown`: anything else. An error that nobody has classified is never taken for a failure.

Times are `time.monotonic_ns()`, which all processes of one machine share; the wall clock is never used.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic_core import from_json

from unibus import errors

Kind = Literal["invoke", "ok", "fail", "unknown"]

# What a service sees: send, request, handle, settle. What its adapter is told, `value` naming many (`unibus_contracts.chaos.watched`):
# try (a send that was not confirmed), copied (a retry's or a dead letter's copy, confirmed), settled (`detail`: accepted,
# released, or moved when a copy has been made before), uncommitted (settled before, and the adapter could not tell the broker),
# lost (no longer ours; without a `value`: all that came by the link).
# Of the run: look, drain, fault; of a process: stalled (its event loop has just stood still for `detail` seconds), and bye, the
# last word of one that was not killed.
What = Literal[
    "send",
    "request",
    "handle",
    "settle",
    "try",
    "copied",
    "settled",
    "uncommitted",
    "lost",
    "look",
    "drain",
    "fault",
    "stalled",
    "bye",
]

# The broker, or the client before a byte has left, said no: nobody will ever see the message. `Unroutable`: it was not stored.
FINAL = (
    errors.ConfigError,
    errors.Unsupported,
    errors.CodecError,
    errors.Refused,
    errors.NotFound,
    errors.AuthenticationFailed,
    errors.PermissionDenied,
    errors.MessageTooLarge,
    errors.Unroutable,
)


def outcome(error: BaseException) -> Kind:
    """What is known of an operation that ended in this error."""
    return "fail" if isinstance(error, FINAL) else "unknown"


_quoted = json.encoder.encode_basestring_ascii


@dataclass(slots=True)
class Operation:
    """One line. `process` and `call` tie an ending to its invocation; calls are numbered as they are made, and by that number
    the sends of a process are told to be in order: it has one bus and one event loop. `at`: nanoseconds, monotonic.

    `value`: what was sent, unique in the run; `place`: channel; `group`: subscription, empty on a queue; `seq`: its number
    among the messages of its key and sender; `attempt`: as the delivery told; `detail`: a word on why, where or what.
    An ending says only what its invocation does not.
    """

    process: str
    call: int
    at: int
    what: What
    kind: Kind
    value: str = ""
    place: str = ""
    group: str = ""
    key: str = ""
    seq: int = 0
    attempt: int = 0
    detail: str = ""


_FIELDS = {field.name for field in fields(Operation)}
_ABOUT = {field.name: field.default for field in fields(Operation) if field.default is not MISSING}
_NEEDED = {"call", "at", "what", "kind"}


class Recorder:
    """Appends to `folder/process.jsonl`. One per process; safe for the tasks and threads of it.

    A line is one `write` to a file opened for appending: what was written before a SIGKILL stays. It is not flushed to the
    disk: the machine's death is not what is tested.

    `by_tick`: what the event loop's thread says in one turn of it is one `write`, at the end of the turn or by `flush`. For
    those alone who flush before anything leaves the process (`unibus_contracts.chaos.watched`): a kill then takes only lines of
    things that nobody else can have seen.
    """

    def __init__(self, folder: Path, process: str) -> None:
        self.process = process
        self.by_tick = False
        self._calls = itertools.count(1)
        self._lines: list[str] = []  # touched by the event loop's thread alone
        self._file = os.open(folder / f"{process}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)

    def close(self) -> None:
        self.flush()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def flush(self) -> None:
        """What was said is in the file when this returns."""
        if self._lines:
            lines, self._lines = self._lines, []
            os.write(self._file, "".join(lines).encode())

    def write(self, operation: Operation) -> None:
        said = {name: getattr(operation, name) for name in _ABOUT}
        about = {name: value for name, value in said.items() if value != _ABOUT[name]}
        self._line(operation.call, operation.at, operation.what, operation.kind, about)

    def _line(self, call: int, at: int, what: str, kind: str, about: Mapping[str, str | int]) -> None:
        # By hand: there may be millions, and json.dumps takes four times as long. `Tail` relies on how a line begins.
        line = f'{{"call":{call},"at":{at},"what":"{what}","kind":"{kind}"'
        for name, value in about.items():
            line += f',"{name}":{_quoted(value) if isinstance(value, str) else value}'
        line += "}\n"
        if self.by_tick and (loop := asyncio._get_running_loop()) is not None:
            if not self._lines:
                loop.call_soon(self.flush)
            self._lines.append(line)
        else:
            os.write(self._file, line.encode())

    def during(self, what: What, **about: str | int) -> Ending:
        """Invoke now, end when the `with` block does: `ok`, or as its exception says, which goes on.

        The block may say otherwise by the `Ending`: `ending.kind = "fail"; ending.detail = "did not bite"`.
        """
        call = next(self._calls)
        self._line(call, time.monotonic_ns(), what, "invoke", about)
        return Ending(self, call, what)

    def note(self, what: What, kind: Kind = "ok", **about: str | int) -> None:
        """Something that has no duration: `note("look", value=…, detail="dead")`."""
        self._line(next(self._calls), time.monotonic_ns(), what, kind, about)


@dataclass(slots=True)
class Ending:
    """How an operation ends, unless an exception says otherwise. `value`: which of many did not end well."""

    recorder: Recorder
    call: int
    what: What
    kind: Kind = "ok"
    detail: str = ""
    value: str = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            # A handler that raises has failed for certain.
            self.kind = "fail" if self.what == "handle" and isinstance(error, Exception) else outcome(error)
            self.detail = self.detail or type(error).__name__
        told: dict[str, str | int] = {"detail": self.detail} if self.detail else {}
        if self.value:
            told["value"] = self.value
        self.recorder._line(self.call, time.monotonic_ns(), self.what, self.kind, told)


@dataclass(frozen=True, slots=True)
class History:
    """All operations, process by process, each in the order in which it wrote them; one at a time, since they may be millions.

    A last line cut off by a SIGKILL is left out. Raises ValueError for any other line that is no operation: a history with
    holes proves nothing.
    """

    folder: Path

    def __iter__(self) -> Iterator[Operation]:
        return Tail(self.folder).new()

    def of(self, *whats: What) -> Iterator[Operation]:
        """Only these. The others are passed over without being read."""
        return Tail(self.folder, whats).new()


_BEGIN = re.compile(rb'\{"call":\d+,"at":\d+,"what":"(\w+)"')


class Tail:
    """Follows a run that goes on: `new()` gives what was written since the last call, process by process. `whats`: only these."""

    def __init__(self, folder: Path, whats: Collection[What] = get_args(What)) -> None:
        self._folder = folder
        self._unwanted = frozenset(what.encode() for what in get_args(What)) - {what.encode() for what in whats}
        self._read: dict[Path, tuple[int, int]] = {}  # how far, and how many lines that were

    def new(self) -> Iterator[Operation]:
        """Raises ValueError, as `History` does."""
        for process, said in self.told():
            say = said.get
            yield Operation(
                process,
                said["call"],
                said["at"],
                said["what"],
                said["kind"],
                say("value", ""),
                say("place", ""),
                say("group", ""),
                say("key", ""),
                say("seq", 0),
                say("attempt", 0),
                say("detail", ""),
            )

    def told(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The same, as process and what its line says: for who reads along, and has no time."""
        begin, unwanted = _BEGIN.match, self._unwanted
        for path in sorted(self._folder.glob("*.jsonl")):
            offset, number = self._read.get(path, (0, 0))
            process = path.stem
            with path.open("rb", 1 << 18) as file:
                file.seek(offset)
                try:
                    for line in file:
                        if line[-1:] != b"\n":  # it is being written, or was cut off
                            break
                        number += 1
                        offset += len(line)
                        if unwanted and (found := begin(line)) and found[1] in unwanted:
                            continue
                        try:
                            said = from_json(line, cache_strings="keys")
                            if not _NEEDED <= said.keys() <= _FIELDS:
                                raise ValueError(f"it says {sorted(said)}")
                        except (ValueError, AttributeError) as error:
                            raise ValueError(f"{path.name}, line {number} is no operation: {error}") from error
                        yield process, said
                finally:
                    self._read[path] = offset, number
