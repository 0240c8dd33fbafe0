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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal, Self

from unibus import errors

Kind = Literal["invoke", "ok", "fail", "unknown"]

# What a service sees: send, request, handle, settle. What its adapter is told, `value` naming many (`unibus_contracts.chaos.watched`):
# try (a send that was not confirmed), copied (a retry's or a dead letter's copy, confirmed), settled (`detail`: accepted,
# released, or moved when a copy has been made before), uncommitted (settled before, and the adapter could not tell the broker),
# lost (no longer ours; without a `value`: all that came by the link).
# Of the run: look, drain, fault, and bye, the last word of a process that was not killed.
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
    """One line. `process` and `call` tie an ending to its invocation; `at`: nanoseconds, monotonic.

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


_ABOUT = {field.name: field.default for field in fields(Operation) if field.default is not MISSING}


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
        said = {name: getattr(operation, name) for name in _ABOUT}
        about = {name: value for name, value in said.items() if value != _ABOUT[name]}
        self._line(operation.call, operation.at, operation.what, operation.kind, about)

    def _line(self, call: int, at: int, what: str, kind: str, about: Mapping[str, str | int]) -> None:
        # By hand: there may be millions, and json.dumps takes four times as long.
        more = "".join(
            f',"{name}":{_quoted(value) if isinstance(value, str) else value}' for name, value in about.items()
        )
        os.write(self._file, f'{{"call":{call},"at":{at},"what":"{what}","kind":"{kind}"{more}}}\n'.encode())

    @contextmanager
    def during(self, what: What, **about: str | int) -> Iterator[Ending]:
        """Invoke now, end when the block does: `ok`, or as its exception says, which goes on.

        The block may say otherwise by the `Ending`: `ending.kind = "fail"; ending.detail = "did not bite"`.
        """
        call = next(self._calls)
        self._line(call, time.monotonic_ns(), what, "invoke", about)
        ending = Ending()
        try:
            yield ending
        except BaseException as error:
            # A handler that raises has failed for certain.
            ending.kind = "fail" if what == "handle" and isinstance(error, Exception) else outcome(error)
            ending.detail = ending.detail or type(error).__name__
            raise
        finally:
            told = {"detail": ending.detail} if ending.detail else {}
            if ending.value:
                told["value"] = ending.value
            self._line(call, time.monotonic_ns(), what, ending.kind, told)

    def note(self, what: What, kind: Kind = "ok", **about: str | int) -> None:
        """Something that has no duration: `note("look", value=…, detail="dead")`."""
        self._line(next(self._calls), time.monotonic_ns(), what, kind, about)


@dataclass(slots=True)
class Ending:
    """How an operation ends, unless an exception says otherwise. `value`: which of many did not end well."""

    kind: Kind = "ok"
    detail: str = ""
    value: str = ""


@dataclass(frozen=True, slots=True)
class History:
    """All operations, process by process, each in the order in which it wrote them; one at a time, since they may be millions.

    A last line cut off by a SIGKILL is left out. Raises ValueError for any other line that is no operation: a history with
    holes proves nothing.
    """

    folder: Path

    def __iter__(self) -> Iterator[Operation]:
        return Tail(self.folder).new()


class Tail:
    """Follows a run that goes on: `new()` gives what was written since the last call, process by process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, tuple[int, int]] = {}  # how far, and how many lines that were

    def new(self) -> Iterator[Operation]:
        """Raises ValueError, as `History` does."""
        for path in sorted(self._folder.glob("*.jsonl")):
            offset, number = self._read.get(path, (0, 0))
            process = path.stem
            with path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):  # it is being written, or was cut off
                        break
                    number += 1
                    try:
                        operation = Operation(**{"process": process, **json.loads(line)})
                    except (ValueError, TypeError) as error:
                        raise ValueError(f"{path.name}, line {number} is no operation: {error}") from error
                    offset += len(line)
                    self._read[path] = offset, number
                    yield operation
