"""docs/adapters.md shows the example adapter whole: its snippets, put together, are the files."""

from __future__ import annotations

import re

from tests.unit.snippets import ROOT, blocks, read

PAGE = read("docs/adapters.md")
EXAMPLE = ROOT / "examples/adapter_sqlite"


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _shown() -> dict[str, str]:
    """File -> all of it that the page shows: a line with nothing but its name begins it, and the blocks that follow go on."""
    parts = re.split(r"^`(\w+\.py)`$", PAGE, flags=re.MULTILINE)
    return {name: "\n".join(blocks(text, "python")) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_the_page_shows_every_file_of_the_adapter_whole() -> None:
    files = {path.name: path for path in (*EXAMPLE.glob("unibus_sqlite/*.py"), EXAMPLE / "conftest.py")}
    shown = _shown()
    assert set(shown) == set(files)
    for name, path in files.items():
        assert _lines(shown[name]) == _lines(path.read_text(encoding="utf-8")), f"docs/adapters.md and {path} differ"


def test_the_page_shows_the_package() -> None:
    [shown] = blocks(PAGE, "toml")
    assert (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8").startswith(shown)


def test_the_adapter_has_the_file_names_of_the_others() -> None:
    rows = set(re.findall(r"^\| `(\w+\.py)`", read("docs/architecture.md"), re.MULTILINE))
    there = {path.name for path in (EXAMPLE / "unibus_sqlite").glob("*.py")}
    # Sending and declaring are a call each, so they are in adapter.py; a profile is for who wants one.
    left_out = {"publisher.py", "declaring.py", "profile.py"}
    assert there == {*rows, "__init__.py"} - left_out


def test_the_chapters_that_the_page_runs_exist() -> None:
    named = {name for block in blocks(PAGE, "console") for name in re.findall(r"\btest_\w+", block)}
    assert len(named) > 8
    assert named <= {path.stem for path in (ROOT / "contracts/unibus_contracts/suite").glob("test_*.py")}
