"""A run of the suite in a pytest process of its own, told step by step to who has started it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .__main__ import of_file
from .cleaner import JOURNAL
from .cleanup import not_deleted, read
from .harness import shown
from .report import build, write

POLL = 0.1  # seconds between two looks at what has happened
PATIENCE = 150.0  # after Ctrl-C, for what the run has made to be deleted
URL = "UNIBUS_CONTRACTS_URL"  # not an argument: everybody on a machine can read those
CACHE = ("-p", "no:cacheprovider")
NO_FILE = ("-c", os.devnull, "-o", "asyncio_default_fixture_loop_scope=function")


class Broken(Exception):
    """The run itself went wrong: there is no report. Its text is what pytest had to say."""


def run(
    url: str,
    step: Callable[[str, str], None],
    *arguments: str,
    tests: Sequence[str] = ("unibus_contracts",),
    report: Path | None = None,
    junit: Path | None = None,
) -> tuple[dict[str, Any], bool]:
    """The report of a run on this broker (a URL, or a unibus.toml), and whether it was interrupted. `report`, `junit`: files that
    get it too, once the run has ended: what is in them is always of this run.

    `arguments`: more for pytest; `tests`: what to run. `step` hears the id and the outcome of each contract. Nothing in the working
    directory has a say: no configuration of pytest, no conftest.py, no module. Raises Broken; KeyboardInterrupt where nothing was done before it.
    """
    with tempfile.TemporaryDirectory(prefix="unibus-contracts-", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        steps, said, own, xml = (folder / name for name in ("steps", "said", "report.json", "junit.xml"))
        steps.touch()
        command = [sys.executable, "-m", "pytest", *NO_FILE, "--rootdir", text, "--noconftest", *CACHE]
        command += [f"--unibus-steps={steps}", f"--unibus-report={own}", *arguments]
        command += [] if junit is None else [f"--junitxml={xml}"]
        if of_file(url):
            command.append(f"--unibus-config={url}")
        with said.open("wb") as output:
            end = _follow([*command, "--pyargs", *tests], output, _environment(url, text), steps, step)
        left = _left_in(folder)
        try:
            found: dict[str, Any] = json.loads(own.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            seen = dict(_lines(steps))
            if not end:
                lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise Broken("\n".join([*(lines[-20:] or ["it has said nothing"]), *left])) from None
            if not seen and not left:
                raise KeyboardInterrupt from None
            found = _partial(url, seen, end, arguments)
        if left:
            found["left"] = [*found["left"], *left]
            found["cleanup"] = [*found.get("cleanup", ()), *left]
        if report is not None:
            write(report, found)
        if junit is not None and xml.exists():
            shutil.copyfile(xml, junit)
        return found, bool(end)


def _environment(url: str, folder: str) -> Mapping[str, str]:
    """In `folder` is all that it leaves when it is killed."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environ |= {"TMPDIR": folder, "PYTHONSAFEPATH": "1"}  # not -P: that would not reach the workers of xdist
    return environ if of_file(url) else {**environ, URL: url}


def _follow(
    command: Sequence[str], output: IO[bytes], environ: Mapping[str, str], steps: Path, step: Callable[[str, str], None]
) -> str:
    """Run it until it ends; by what it was interrupted, empty: by nothing. Ctrl-C and SIGTERM give it the time to clean up; a second
    one ends it at once.
    """
    signals: list[int] = []  # noted, not raised: what is under way here is done whenever they come
    before = {n: signal.signal(n, lambda n, _: signals.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    interrupted, deadline, told = "", float("inf"), 0
    process = None
    try:
        process = subprocess.Popen(  # noqa: S603  # our own interpreter, no shell
            command, stdout=output, stderr=output, env=environ, start_new_session=True
        )
        while True:
            ended = process.poll() is not None
            seen = _lines(steps)
            for id, outcome in seen[told:]:
                step(id, outcome)
            told = len(seen)
            if ended:
                return interrupted
            if signals and interrupted:
                return "interrupted twice"
            if signals:
                signals.clear()
                interrupted, deadline = "interrupted", time.monotonic() + PATIENCE
                process.send_signal(signal.SIGINT)
            if time.monotonic() > deadline:
                return f"it did not end within {PATIENCE:g} s of Ctrl-C"
            time.sleep(POLL)
    finally:
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _lines(steps: Path) -> list[tuple[str, str]]:
    """What has been told so far: id and outcome of each contract. A last line that is half written is told later."""
    *lines, _ = steps.read_text(encoding="utf-8").split("\n")
    return [(id, outcome) for id, outcome in map(json.loads, lines)]


def _left_in(folder: Path) -> list[str]:
    """What a run that was killed may have made, a line each prefix."""
    journals = sorted(folder.rglob(f"*{JOURNAL}"))
    return [not_deleted(made.prefix, "the run was ended before that") for path in journals for made in read(path)]


def _partial(url: str, seen: Mapping[str, str], end: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The report of a run that was ended before it could write one."""
    from .catalogue import catalogue  # the whole suite, which only this case needs

    known = {id: terms.as_dict() for id, (terms, _) in catalogue().items()}
    return build(
        *(shown(url), known, {id: (outcome, 0.0) for id, outcome in seen.items()}, None),
        finished=False,
        declare="assume" if "--unibus-declare=assume" in arguments else "create",
        broken_off=end,
    )
