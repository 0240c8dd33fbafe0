"""The contract suite on a target, in a process of its own, as rows of the comparison: one a chapter."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..cleaner import JOURNAL
from ..cleanup import Made, read
from ..harness import CREDENTIALS
from ..report import FAILED, NOT_RUN, NOT_TRIED, PASSED, REFUSED
from ..runner import CACHE, NO_FILE, PATIENCE, URL
from .model import Found, Row, State
from .targets import Target

CHAPTER = "contracts"
LIMIT, QUICK_LIMIT = 900.0, 150.0  # seconds; what has not been run by then is told as that
# Of --quick: what services rely on first. The rows of the others are not there.
QUICK = ("honesty", "settle", "retry", "order", "dead_letter", "fanout", "publish", "consume")


@dataclass(frozen=True)
class Outcome:
    """A report of the suite, or why there is none."""

    report: dict[str, Any] = field(default_factory=dict)
    error: str = ""


async def run(
    target: Target,
    prefix: str,
    left: list[Made],
    *,
    quick: bool,
    partial: Callable[[Outcome], object] = lambda _found: None,
) -> Outcome:
    """Run it, with names that begin with `prefix`. It deletes what it makes; what it had no more time for is added to `left`.

    Cancelled, it tells `partial` what was found by then.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        path = Path(folder, "report.json")
        packages = [f"unibus_contracts.suite.test_{name}" for name in QUICK] if quick else ["unibus_contracts"]
        options = [f"--unibus-report={path}", f"--unibus-prefix={prefix}", "--rootdir", folder, "--noconftest", "-q"]
        if target.file is not None:
            options.append(f"--unibus-config={target.file}")
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "pytest", *NO_FILE, *CACHE, *options, "--pyargs", *packages),
            env=_environment(target, folder),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to pass on, once
        )
        try:
            await asyncio.wait_for(child.wait(), QUICK_LIMIT if quick else LIMIT)
        except TimeoutError:
            pass  # what it has done by then is in its report
        except asyncio.CancelledError:
            await _end(child)
            if (found := _read(path, output, child.returncode)).report:
                partial(found)
            raise
        finally:
            try:
                await _end(child)
            finally:
                left += _left_in(folder)
        return _read(path, output, child.returncode)


def _left_in(folder: str) -> list[Made]:
    """What a process made that was killed."""
    return [made for journal in Path(folder).rglob(f"*{JOURNAL}") for made in read(journal)]


def _environment(target: Target, folder: str) -> dict[str, str]:
    """The URL is in it, not among the arguments, which everybody on the machine could read. Of the settings of a service in the
    environment only those count that belong to a unibus.toml.
    """
    environ = {n: v for n, v in os.environ.items() if not n.startswith("UNIBUS_") or n.startswith("UNIBUS_TEST_")}
    environ.pop("PYTEST_ADDOPTS", None)
    environ["TMPDIR"] = folder
    if target.file is None:
        environ[URL] = target.text()
    else:
        environ |= {name: os.environ[name] for name in CREDENTIALS if name in os.environ}
    return environ


async def _end(child: asyncio.subprocess.Process) -> None:
    """By Ctrl-C, so that it writes its report and cleans up; by force if it does not, or if that is broken off too."""
    if child.returncode is not None:
        return
    child.send_signal(signal.SIGINT)
    try:
        await asyncio.wait_for(child.wait(), PATIENCE)
    except TimeoutError:
        pass
    finally:
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)
            await child.wait()


def _read(path: Path, printed: IO[bytes], status: int | None) -> Outcome:
    if not path.exists() or not path.stat().st_size:
        printed.seek(0)
        last = printed.read().decode(errors="replace").strip().splitlines()[-1:] or ["nothing was said"]
        return Outcome(error=f"no report (exit status {status}): {last[0]}")
    return Outcome(json.loads(path.read_text(encoding="utf-8")))


def rows(outcomes: Sequence[Outcome], *, quick: bool) -> Iterator[tuple[Row, list[tuple[State, Found]]]]:
    """A row for each chapter that any of the reports has, and its cells."""
    chapters = dict.fromkeys(
        entry["chapter"] for outcome in outcomes for entry in outcome.report.get("contracts", ()) if entry["chapter"]
    )
    shown = [chapter for chapter in QUICK if chapter in chapters] if quick else [*chapters]  # a report names them all
    for chapter in shown or ["none"]:
        row = Row(
            id=f"contracts.{chapter}",
            chapter=CHAPTER,
            title=f"contracts: {chapter.replace('_', ' ')}",
            how="the contract suite"
            + (", the chapters that --quick runs" if quick else "")
            + ": kept, refused as declared, broken. A refused feature was tried, and the refusal is what was checked.",
            unit="broken",
            better="less",
        )
        yield row, [_cell(outcome, chapter) for outcome in outcomes]


def _cell(outcome: Outcome, chapter: str) -> tuple[State, Found]:
    entries = [entry for entry in outcome.report.get("contracts", ()) if entry["chapter"] == chapter]
    if not entries:
        return ("failed", Found(text=outcome.error)) if outcome.error else ("not run", Found(text="not run"))
    by = {
        state: [entry["id"] for entry in entries if entry["outcome"] == state]
        for state in (PASSED, REFUSED, FAILED, NOT_TRIED, NOT_RUN)
    }
    text = ", ".join(f"{len(ids)} {_WORDS[state]}" for state, ids in by.items() if ids)
    told = [f"{_WORDS[state]}: {', '.join(by[state])}" for state in (FAILED, REFUSED, NOT_TRIED, NOT_RUN) if by[state]]
    found = Found(text=text, value=float(len(by[FAILED])), note="; ".join(told))
    if len(by[NOT_RUN]) == len(entries):
        return "not run", found
    return ("failed" if by[FAILED] else "measured"), found


_WORDS = {PASSED: "kept", REFUSED: "refused", FAILED: "broken", NOT_TRIED: "not tried", NOT_RUN: "not run"}
