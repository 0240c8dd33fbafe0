"""Running contracts against saboteurs: each in a pytest process of its own, in time that leaps.

The processes are forked from one that has imported everything, so that a trial costs its contracts and little more.
"""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from unibus_contracts.report import FAILED, NOT_RUN, PASSED, REFUSED

from .base import HOST, PASSWORD, SCHEME

SECONDS = 300  # a process: far above what any needs, and a hang is an end
SUITE = Path(__file__).parent.parent / "suite"

ENTRY_POINT = f"[unibus.adapters]\n{SCHEME} = unibus_contracts.saboteurs.factory:make\n"
METADATA = "Metadata-Version: 2.1\nName: unibus-saboteurs\nVersion: 0\n"
# These and no others: what else is installed has no say, and costs nothing.
PLUGINS = ("unibus_contracts.saboteurs.leap", "pytest_asyncio.plugin", "pytest_timeout", "unibus_contracts.plugin")
INI = "[pytest]\nasyncio_default_fixture_loop_scope = function\n"

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["unibus_contracts.saboteurs.warm"])


def contracts() -> dict[str, str]:
    """Every contract of the suite: its id, and where pytest finds it. Read, not imported: pytest wants to do that itself."""
    found = {}
    for path in sorted(SUITE.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for decorator in getattr(node, "decorator_list", ()):
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "contract":
                    id = ast.literal_eval(decorator.args[0])
                    found[id] = f"unibus_contracts.suite.{path.stem}::{getattr(node, 'name', '')}"
    return found


@contextmanager
def installed() -> Iterator[Path]:
    """A folder in which the saboteurs are an installed distribution, for processes that have it on their path."""
    with tempfile.TemporaryDirectory(prefix="unibus-saboteurs-") as text:
        folder = Path(text)
        distribution = folder / "unibus_saboteurs-0.dist-info"
        distribution.mkdir()
        (distribution / "METADATA").write_text(METADATA)
        (distribution / "entry_points.txt").write_text(ENTRY_POINT)
        (folder / "pytest.ini").write_text(INI)
        yield folder


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of each contract, by id, and what pytest said."""

    outcomes: Mapping[str, str]
    output: str
    seconds: float = 0.0

    def __add__(self, other: Trial) -> Trial:
        return Trial({**self.outcomes, **other.outcomes}, self.output + other.output, self.seconds + other.seconds)

    @property
    def caught_by(self) -> list[str]:
        return [id for id, outcome in self.outcomes.items() if outcome == FAILED]

    @property
    def kept(self) -> list[str]:
        return [id for id, outcome in self.outcomes.items() if outcome in (PASSED, REFUSED)]


def trial(folder: Path, name: str, nodes: Sequence[str], *, part: int = 0, url: str | None = None) -> Trial:
    """The contracts at `nodes` against one saboteur; `HEALTHY`: against none. `part`: of a run in several.

    `url`: against the adapter of this URL, which lives in this process too; the report stays in `folder` as `<name>-<part>.json`.
    """
    report, output = folder / f"{name}-{part}.json", folder / f"{name}-{part}.txt"
    begun = time.monotonic()
    arguments = ["-q", "--tb=line", "--show-capture=no", "-p", "no:cacheprovider"]
    arguments += [word for plugin in PLUGINS for word in ("-p", plugin)]
    arguments += ["-c", str(folder / "pytest.ini"), "--rootdir", str(folder), "--pyargs", *nodes]
    arguments += [
        f"--unibus-url={url or f'{SCHEME}://sam:{PASSWORD}@{HOST}?saboteur={name}'}",
        f"--unibus-report={report}",
    ]
    process = _FORKS.Process(target=_pytest, args=(folder, output, arguments))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    said = output.read_text(encoding="utf-8", errors="replace") if output.exists() else "it did not even start"
    if not report.exists():
        return Trial({}, said, time.monotonic() - begun)
    told = json.loads(report.read_text(encoding="utf-8"))
    outcomes = {entry["id"]: entry["outcome"] for entry in told["contracts"] if entry["outcome"] != NOT_RUN}
    return Trial(outcomes, said, time.monotonic() - begun)


def _pytest(folder: Path, output: Path, arguments: list[str]) -> None:
    """In the forked process: the saboteurs installed, for its children too, and all that is said in a file."""
    import pytest

    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(folder / "cache")  # what pytest compiles, for the next one
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    sys.exit(pytest.main(arguments))
