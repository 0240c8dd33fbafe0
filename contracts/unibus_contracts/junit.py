"""What pytest's JUnit file does not tell of a run: why the run fails where no contract did, and what was refused as declared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from .report import beside


def complete(path: Path, report: Mapping[str, Any]) -> None:
    """Add it to the file: a failed test for each problem that is no contract's, and `skipped` to what was refused."""
    tree = ET.parse(path)  # noqa: S314  # pytest has just written it
    suite = tree.find("testsuite")
    if suite is None:
        return
    refused = 0
    for case in suite.iter("testcase"):
        name = next((p.get("value", "") for p in case.iter("property") if p.get("name") == "unibus_refused"), None)
        if name is not None and not any(case.find(kind) is not None for kind in ("failure", "error", "skipped")):
            why = report["features"].get(name, {}).get("how", "")
            told = _text(f"refused as declared: {name}: {why}")
            ET.SubElement(case, "skipped", type="unibus.refused", message=told).text = told
            refused += 1
    problems = [_text(problem) for problem in beside(report)]
    for problem in problems:
        case = ET.SubElement(suite, "testcase", classname="unibus_contracts", name=problem, time="0")
        ET.SubElement(case, "failure", message=problem).text = problem
    for count, more in (("tests", len(problems)), ("failures", len(problems)), ("skipped", refused)):
        suite.set(count, str(int(suite.get(count, "0")) + more))
    tree.write(path, encoding="utf-8", xml_declaration=True)


def _text(text: str) -> str:
    """What XML can hold."""
    return "".join(c if c.isprintable() else " " for c in text)
