"""`python -m unibus_contracts URL...`: the suite on each broker, a report for each, and one line each at the end.

A URL that was given and does not answer is a failure, and so is an empty one: nothing is skipped because a variable
was not set.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import summary


def of_file(target: str) -> bool:
    """Is it a unibus.toml, and no URL?"""
    return target.endswith(".toml") and "://" not in target


def report_paths(urls: Sequence[str], folder: Path) -> list[Path]:
    """One file a URL, named by its scheme (of a unibus.toml, by its own name); several of one name are numbered."""
    schemes = [Path(url).stem if of_file(url) else url.partition(":")[0] for url in urls]
    return [
        folder / (f"{scheme}.json" if schemes.count(scheme) == 1 else f"{scheme}-{schemes[: n + 1].count(scheme)}.json")
        for n, scheme in enumerate(schemes)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unibus_contracts", description=__doc__)
    parser.add_argument("urls", metavar="URL", nargs="+", help="memory://, amqp://..., or a unibus.toml; one run each")
    parser.add_argument("--reports", metavar="FOLDER", type=Path, default=Path("reports"), help="default: reports")
    options, passed_on = parser.parse_known_args(arguments)
    if not all(options.urls):
        parser.error("a URL is empty: is the variable that should hold it set?")
    status = 0
    paths = report_paths(options.urls, options.reports)
    for url, path in zip(options.urls, paths, strict=True):
        path.unlink(missing_ok=True)  # an old report must not stand for a run that broke off
        # With "=": pytest would take a file that exists, alone in an argument, for a hint at the project's folder.
        where = f"--unibus-{'config' if of_file(url) else 'url'}={url}"
        command = [sys.executable, "-m", "pytest", "--pyargs", "unibus_contracts", where]
        command += [f"--unibus-report={path}", *passed_on]
        status |= bool(subprocess.run(command, check=False).returncode)  # noqa: S603  # our own interpreter, no shell
    return summary.main([str(path) for path in paths]) or status


if __name__ == "__main__":
    sys.exit(main())
