"""The outcome of a run as data: one entry a contract, and which declared features no passed contract has exercised. Pure but for `write`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PASSED = "passed"
REFUSED = "refused-as-declared"
FAILED = "failed"
NOT_TRIED = "not-tried"  # it needs a fault that the harness can't inject
NOT_RUN = "not-run"  # left out, or the run was broken off


def build(
    url: str,
    contracts: Mapping[str, Mapping[str, Any]],
    outcomes: Mapping[str, tuple[str, float]],
    capabilities: Mapping[str, Any] | None,
    *,
    finished: bool = True,
    errors: Mapping[str, str] | None = None,
    declare: str = "create",
    gone: str | None = None,
    broken_off: str | None = None,
) -> dict[str, Any]:
    """`contracts`: id -> terms, in order; `outcomes`: id -> (outcome, seconds); `finished`: the run was not broken off.

    `errors`: id -> what a failed one said, or why one was not tried. `declare`: under `assume`, where nothing may be made, a feature of which not
    all contracts could be tried may stay unproven. `gone`: why the broker could not be reached any more. `broken_off`: why
    the run has ended by itself before its time.
    """
    entries = []
    for id, terms in contracts.items():
        outcome, seconds = outcomes.get(id, (NOT_RUN, 0.0))
        why = {FAILED: "error", NOT_TRIED: "reason"}.get(outcome)
        said = {why: text} if why and (text := (errors or {}).get(id)) else {}
        entries.append({**terms, "outcome": outcome, "duration": round(seconds, 3), **said})
    told = capabilities or {}
    report = {
        "suite": 1,
        "url": url,
        "finished": finished,
        "gone": gone,
        "broken_off": broken_off,
        "declare": declare,
        "adapter": told.get("adapter"),
        "version": told.get("version"),
        "features": told.get("features", {}),
        "numbers": told.get("numbers", {}),
        "contracts": entries,
    }
    unused = unexercised(report["features"], entries)
    untried = {entry["capability"] for entry in entries if entry["outcome"] == NOT_TRIED} if declare == "assume" else ()
    report["unexercised"] = [name for name in unused if name not in untried]
    report["unproven"] = [name for name in unused if name in untried]
    report["differs"] = []  # from what is pinned, where that was asked for
    report["left"] = []  # what could not be deleted at the end, and why: known once the run has cleaned up
    return report


def unexercised(features: Mapping[str, Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Features that are declared and that no passed contract needs. Meaningful only if every contract was run."""
    if not entries or any(entry["outcome"] == NOT_RUN for entry in entries):
        return []
    proven = {entry["capability"] for entry in entries if entry["outcome"] == PASSED}
    declared = (name for name, support in features.items() if support["level"] != "refused")
    return [name for name in declared if name not in proven]


def problems(report: Mapping[str, Any]) -> list[str]:
    """Why this report is no pass, a line each; empty: it is one."""
    failed = (entry for entry in report.get("contracts", []) if entry["outcome"] == FAILED)
    return [*(f"{entry['id']}: {entry['promise']}" for entry in failed), *beside(report)]


def beside(report: Mapping[str, Any]) -> list[str]:
    """Those of the problems that are no single contract's."""
    found = []
    if not any(entry["outcome"] == PASSED for entry in report.get("contracts", [])):
        found.append("no contract passed: an empty report proves nothing")
    if not report["finished"]:
        why = report.get("broken_off")
        found.append("the run was broken off" + (f": {why}" if why else ""))
    found += [f"feature {name!r} is declared, and no passed contract has used it" for name in report["unexercised"]]
    found += report["differs"]
    return found


def untried(report: Mapping[str, Any]) -> list[str]:
    """What could not be tried and why, a line each reason, and what is not proven by that. No problems."""
    by_reason: dict[str, list[str]] = {}
    for entry in report.get("contracts", []):
        if entry["outcome"] == NOT_TRIED:
            by_reason.setdefault(entry.get("reason", ""), []).append(entry["id"])
    found = [f"not tried, {reason}: {', '.join(ids)}" for reason, ids in by_reason.items()]
    unproven = report.get("unproven")
    return [*found, *([f"declared, but not proven by this run: {', '.join(unproven)}"] if unproven else [])]


def line(report: Mapping[str, Any]) -> str:
    """One line for people."""
    outcomes = [entry["outcome"] for entry in report.get("contracts", [])]
    name = " ".join(str(part) for part in (report.get("adapter"), report.get("version")) if part) or "no adapter"
    counts = f"{outcomes.count(PASSED)} passed, {outcomes.count(REFUSED)} refused as declared"
    tried = f", {outcomes.count(NOT_TRIED)} not tried" if NOT_TRIED in outcomes else ""
    left = f"{outcomes.count(FAILED)} failed{tried}, {outcomes.count(NOT_RUN)} not run"
    behind = "; not all that it made is deleted" if report.get("left") else ""
    return f"{name} at {report.get('url')}: {counts}, {left}{behind}"


def write(path: Path, report: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
