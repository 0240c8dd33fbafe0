"""Operations on disk: one file per process, a line of JSON each, written at once.

Every operation has two lines: `invoke` before anything is done, then how it ended. A process that is killed in between leaves
the first line alone, which the checker reads as `unknown`: it may have happened.

- `ok`: the other side has confirmed it.
- `fail`: it has certainly not happened. Only errors that say so for good (`FINAL`) are that.
- `unknown`: anything else. An error that nobody has classified is never taken for a failure.

Times are `time.monotonic_ns()`, which all processes of one machine share; the wall clock is never used.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from unibus import errors

Kind = Literal["invoke", "ok", "fail", "unknown"]
What = Literal["send", "request", "handle", "settle", "look", "drain", "fault"]

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


@dataclass(frozen=True, slots=True)
class Operation:
    """One line. `process` and `call` tie an ending to its invocation; `at`: nanoseconds, monotonic.

    `value`: what was sent, unique in the run; `place`: channel; `group`: subscription, empty on a queue; `seq`: its number
    among the messages of its key and sender; `attempt`: as the delivery told; `detail`: a word on why, where or what.
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


_DEFAULTS = {field.name: field.default for field in fields(Operation)}


class Recorder:
    """Appends to `folder/process.jsonl`. One per process; safe for the tasks and threads of it.

    A line is one `write` to a file opened for appending: what was written before a SIGKILL stays. It is not flushed to the
    disk: the machine's death is not what is tested.
    """

    def __init__(self, folder: Path, process: str) -> None:
        self.process = process
        self._calls = itertools.count(1)
        self._file = os.open(folder / f"{process}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, operation: Operation) -> None:
        said = {name: value for name, value in asdict(operation).items() if value != _DEFAULTS[name]}
        os.write(self._file, json.dumps(said, separators=(",", ":")).encode() + b"\n")

    @contextmanager
    def during(self, what: What, **about: Any) -> Iterator[Ending]:
        """Invoke now, end when the block does: `ok`, or as its exception says, which goes on.

        The block may say otherwise by the `Ending`: `ending.kind = "fail"; ending.detail = "did not bite"`.
        """
        call = next(self._calls)
        self.write(Operation(self.process, call, time.monotonic_ns(), what, "invoke", **about))
        ending = Ending()
        try:
            yield ending
        except BaseException as error:
            # A handler that raises has failed for certain; of everything else only what is FINAL has.
            certain = isinstance(error, FINAL) or (what == "handle" and isinstance(error, Exception))
            ending.kind = "fail" if certain else "unknown"
            ending.detail = ending.detail or type(error).__name__
            raise
        finally:
            told = about | ({"detail": ending.detail} if ending.detail else {})
            self.write(Operation(self.process, call, time.monotonic_ns(), what, ending.kind, **told))

    def note(self, what: What, kind: Kind = "ok", **about: Any) -> None:
        """Something that has no duration: `note("look", value=…, detail="dead")`."""
        self.write(Operation(self.process, next(self._calls), time.monotonic_ns(), what, kind, **about))


@dataclass(slots=True)
class Ending:
    """How an operation ends, unless an exception says otherwise."""

    kind: Kind = "ok"
    detail: str = ""


def read(folder: Path) -> list[Operation]:
    """All processes' operations in the order of their times. A last line cut off by a SIGKILL is left out.

    Raises ValueError for any other line that is no operation: a history with holes proves nothing.
    """
    return sorted(Tail(folder).new(), key=lambda operation: operation.at)


class Tail:
    """Follows a run that goes on: `new()` gives what was written since the last call, process by process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, tuple[int, int]] = {}  # how far, and how many lines that were

    def new(self) -> Iterator[Operation]:
        """Raises ValueError, as `read` does."""
        for path in sorted(self._folder.glob("*.jsonl")):
            offset, number = self._read.get(path, (0, 0))
            with path.open("rb") as file:
                file.seek(offset)
                *lines, _ = file.read().split(b"\n")  # the rest is empty, or what is being written, or was cut off
            self._read[path] = offset + sum(len(line) + 1 for line in lines), number + len(lines)
            for at, line in enumerate(lines, number + 1):
                try:
                    yield Operation(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path.name}, line {at} is no operation: {error}") from error
