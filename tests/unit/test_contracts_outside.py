"""The suite and an adapter in a repository of its own: installed files only, in an environment that has no link to this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from tests.unit.snippets import ROOT

EXAMPLE = ROOT / "examples/adapter_sqlite"
SOME = "test_two_groups or test_told or test_at_once"
SECONDS = 300  # a pytest of its own takes three on an idle machine

pytestmark = pytest.mark.timeout(2 * SECONDS)


def install(project: Path, into: Path) -> None:
    """What its wheel would hold. No build backend is at hand without a network, so the list of packages is read here."""
    told = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    for package in told["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        shutil.copytree(project / package, into / Path(package).name, ignore=shutil.ignore_patterns("__pycache__"))
    name, about = told["project"]["name"].replace("-", "_"), told["project"]
    info = into / f"{name}-{about['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    groups = {**about.get("entry-points", {}), "console_scripts": about.get("scripts", {})}
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a new environment that has unibus, the example adapter, and from here only what others have written."""
    folder = tmp_path_factory.mktemp("outside") / "venv"
    venv.create(folder, with_pip=False)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv" if sys.platform != "win32" else "nt", scheme))
    install(ROOT, site)
    install(EXAMPLE, site)
    # Its .pth files, and so what is installed editable, don't count behind one of ours.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin/python"


def run(python: Path, folder: Path, *arguments: str) -> str:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "UNIBUS", "PYTEST"))}
    done = subprocess.run(
        [str(python), *arguments],
        cwd=folder,
        env=environ,
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_what_was_installed(python: Path, tmp_path: Path) -> None:
    code = "import unibus, unibus_sqlite, unibus_contracts.suite as s; print(unibus.__file__, unibus_sqlite.__file__, s.__file__)"
    found = run(python, tmp_path, "-c", code).split()
    assert len(found) == 3
    assert all(Path(one).is_relative_to(python.parents[1]) for one in found), found


def test_by_a_url(python: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'broker.db'}"
    said = run(python, tmp_path, "-m", "pytest", "--pyargs", "unibus_contracts", f"--unibus-url={url}", "-k", SOME)
    assert ": 3 passed, 0 refused as declared, 0 failed" in said


def test_by_a_harness(python: Path, tmp_path: Path) -> None:
    """The conftest.py of the adapter's repository says where the broker is."""
    shutil.copy(EXAMPLE / "conftest.py", tmp_path)
    shutil.copy(EXAMPLE / "pyproject.toml", tmp_path)
    said = run(python, tmp_path, "-m", "pytest", "--pyargs", "unibus_contracts", "-k", SOME)
    assert "sqlite 3" in said
    assert ": 3 passed, 0 refused as declared, 0 failed" in said
