"""A run of the suite in a pytest process of its own, told step by step to who has started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .__main__ import of_file

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
) -> tuple[dict[str, Any], bool]:
    """The report of a run on this broker (a URL, or a unibus.toml), and whether it was interrupted; `report`: a file that has it too.

    `arguments`: more for pytest; `tests`: what to run. `step` hears the id and the outcome of each contract. No configuration of pytest in the working directory has a say.
    Raises Broken.
    """
    with tempfile.TemporaryDirectory(prefix="unibus-contracts-") as text:
        folder = Path(text)
        steps, said, own = folder / "steps", folder / "said", folder / "report.json"
        steps.touch()
        command = [sys.executable, "-m", "pytest", *NO_FILE, "--rootdir", text, *CACHE, "--pyargs", *tests]
        command += [f"--unibus-steps={steps}", f"--unibus-report={report or own}", *arguments]
        if of_file(url):
            command.append(f"--unibus-config={url}")
        with said.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603  # our own interpreter, no shell
                command, stdout=output, stderr=output, env=_environment(url), start_new_session=True
            )
            interrupted = _follow(process, steps, step)
        try:
            found: dict[str, Any] = json.loads((report or own).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise Broken("\n".join(lines[-20:])) from None
        return found, interrupted


def _environment(url: str) -> Mapping[str, str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return environ if of_file(url) else {**environ, URL: url}


def _follow(process: subprocess.Popen[bytes], steps: Path, step: Callable[[str, str], None]) -> bool:
    """Until it ends. Ctrl-C and SIGTERM interrupt it, and give it the time to clean up; a second one ends it at once."""
    interrupted = False
    deadline = float("inf")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with steps.open(encoding="utf-8") as file:
            begun = ""
            while True:
                try:
                    ended = process.poll() is not None
                    begun += file.read()
                    *lines, begun = begun.split("\n")
                    for line in lines:
                        step(*json.loads(line))
                    if ended:
                        return interrupted
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"the run did not end within {PATIENCE:g} s of Ctrl-C")
                    time.sleep(POLL)
                except KeyboardInterrupt:
                    if interrupted:
                        raise
                    interrupted, deadline = True, time.monotonic() + PATIENCE
                    process.send_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
