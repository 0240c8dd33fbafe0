"""The run: every probe on every target, into one document of plain data. What fails is a cell that says so.

Contracts first, on all targets at once; then the probes that have to be alone, target by target; then those that mostly
wait, on all targets at once. The document is whole at every moment: what has not been run says that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from time import perf_counter
from typing import Any

from unibus.capabilities import Support
from unibus.deadletter import describe

from . import contracts
from .lab import Lab, Missing
from .model import Declared, Found, NotMeasurable, Probe, Row, Sizes, State
from .probes import ALL
from .targets import Target

FORMAT = 1
GONE = 5.0  # seconds without an answer after which a broker has gone
FACTOR = float(os.environ.get("UNIBUS_TEST_TIMEOUT_FACTOR", "1"))
log = logging.getLogger("unibus.compare")

Document = dict[str, Any]
Progress = Callable[[str, str, float], None]  # target, what is done, seconds


def nothing(target: str, done: str, seconds: float) -> None:
    """Nobody looks."""


class Run:
    """`document` is as far as it has come. `only`: chapters or probes, empty for all; `contracts` is one of them."""

    def __init__(
        self,
        targets: Sequence[Target],
        sizes: Sizes,
        *,
        quick: bool = False,
        only: Collection[str] = (),
        touched: Collection[str] | None = None,
        progress: Progress = nothing,
        probes: Sequence[Probe | Declared] = ALL,
    ) -> None:
        self._labs = [Lab(target, sizes) for target in targets]
        self._progress = progress
        self._probes = [p for p in probes if not only or _names(p) & set(only)]
        self._contracts = not only or contracts.CHAPTER in only
        self._quick = quick
        self._rows: dict[str, dict[str, Any]] = {}
        self.document: Document = {
            "compare": FORMAT,
            "finished": False,
            "quick": quick,
            "only": sorted(only),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "machine": machine(),
            "targets": [_told(lab) for lab in self._labs],
            "rows": [],
        }
        for probe in self._probes:
            for row in [probe.row] if isinstance(probe, Declared) else probe.rows:
                self._add(row, touched)

    def _add(self, row: Row, touched: Collection[str] | None = None) -> None:
        entry = {
            "id": row.id,
            "chapter": row.chapter,
            "title": row.title,
            "how": row.how,
            "feature": row.feature,
            "unit": row.unit,
            "better": row.better,
            "axes": list(row.axes) if row.axes else None,
            "logarithmic": row.logarithmic,
            "yours": None if touched is None else bool(set(row.touches) & set(touched)),
            "cells": [cell("not run", "", "not run") for _ in self._labs],
        }
        self._rows[row.id] = entry
        self.document["rows"].append(entry)

    async def __call__(self) -> Document:
        """Run all of it. Cancelled, it leaves the document as far as it came, with `finished` false."""
        begun = perf_counter()
        try:
            await asyncio.gather(*(self._connect(column) for column in range(len(self._labs))))
            self._baptise()
            if self._contracts:
                await self._run_contracts()
            for column in range(len(self._labs)):
                for probe in self._probes:
                    if isinstance(probe, Declared):
                        self._declare(probe.row, column)
                    elif not probe.waits:
                        await self._measure(probe, column)
            await asyncio.gather(*(self._wait(column) for column in range(len(self._labs))))
            self.document["finished"] = not any("gone" in told for told in self.document["targets"])
        finally:
            self.document["seconds"] = round(perf_counter() - begun, 1)
        return self.document

    async def remove(self) -> None:
        """Delete what the run has made on the brokers. To be awaited after it, however it ended; the document tells what is left."""
        await asyncio.gather(*(self._remove(column) for column in range(len(self._labs))))

    async def _remove(self, column: int) -> None:
        lab, told, begun = self._labs[column], self.document["targets"][column], perf_counter()
        told["left"] = f"what begins with {lab.prefix!r}: broken off"
        removal = await lab.remove()
        told |= {"deleted": removal.deleted, "left": removal.left}
        if removal.deleted:
            self._progress(told["name"], f"deleted {removal.deleted} objects", perf_counter() - begun)

    async def _connect(self, column: int) -> None:
        lab, told = self._labs[column], self.document["targets"][column]
        try:
            async with asyncio.timeout(60 * FACTOR):
                known = await lab.connect()
        except Exception as error:
            told["error"] = _said(error)
            self._progress(told["name"], f"can't be reached: {told['error']}", 0.0)
            return
        told |= {"adapter": known.adapter, "version": known.version}

    def _baptise(self) -> None:
        """Once it is known who answers; in order, so that the same targets have the same names in each run."""
        taken: list[str] = []
        for lab, told in zip(self._labs, self.document["targets"], strict=True):
            if lab.capabilities is not None:
                told["name"] = _name(lab, self._labs, taken)
            taken.append(told["name"])

    async def _run_contracts(self) -> None:
        outcomes = [contracts.Outcome() for _ in self._labs]  # nothing was run

        async def one(column: int) -> None:
            told, begun, lab = self.document["targets"][column], perf_counter(), self._labs[column]
            if "error" in told:
                outcomes[column] = contracts.Outcome(error=told["error"])
                return

            def keep(outcome: contracts.Outcome) -> None:
                outcomes[column] = outcome
                lab.left += [text.removeprefix("not deleted: ") for text in outcome.report.get("left", ())]

            keep(await contracts.run(lab.target, lab.prefix, lab.made, quick=self._quick, partial=keep))
            self._progress(told["name"], contracts.CHAPTER, perf_counter() - begun)

        try:
            # Broken off, it waits until each has written what it found: the first that ends is not the last.
            ended = await asyncio.gather(*(one(column) for column in range(len(self._labs))), return_exceptions=True)
            for error in filter(None, ended):
                raise error
        finally:
            for row, cells in contracts.rows(outcomes, quick=self._quick):
                self._add(row)
                for column, (state, found) in enumerate(cells):
                    self._put(row.id, column, state, found)

    async def _wait(self, column: int) -> None:
        waiting = [probe for probe in self._probes if isinstance(probe, Probe) and probe.waits]

        async def in_turn() -> None:
            for probe in waiting:
                if not probe.long:
                    await self._measure(probe, column)

        await asyncio.gather(*(self._measure(probe, column) for probe in waiting if probe.long), in_turn())

    def _declare(self, row: Row, column: int) -> None:
        if error := self.document["targets"][column].get("error"):
            self._put(row.id, column, "failed", Found(text=error))
            return
        support = _support(self._labs[column], row.feature)
        limit = "" if support is None or support.limit is None else f" (limit {support.limit:,.0f} {row.unit})"
        text = "nothing is declared" if support is None else f"{support.level}{limit}"
        self._put(row.id, column, "declared", Found(text=text))

    async def _measure(self, probe: Probe, column: int) -> None:
        lab, told, begun = self._labs[column], self.document["targets"][column], perf_counter()
        state: State = "measured"
        found: Mapping[str, Found] = {}
        fallback = Found(text="nothing was found")
        if "error" in told:
            state, fallback = "failed", Found(text=told["error"])
        elif "gone" in told:
            state, fallback = "not run", Found(text=f"the broker has gone: {told['gone']}")
        elif probe.needs is not None and not _support(lab, probe.needs):
            state, fallback = "refused", Found(text="refused")
        else:
            try:
                async with asyncio.timeout(probe.limit * FACTOR):
                    found = await probe.measure(lab)
            except NotMeasurable as error:
                state, fallback = "not run", Found(text=f"can't be measured here: {error}")
            except TimeoutError as error:
                late = f"not done within {probe.limit * FACTOR:g} s"
                state, fallback = "failed", Found(text=_said(error) if str(error) else late)
            except Exception as error:
                log.debug("probe %s", probe.name, exc_info=True)
                state, fallback = "failed", Found(text=_said(error))
        for row in probe.rows:
            if row.id in found:
                self._put(row.id, column, "measured", found[row.id])
            else:
                self._put(row.id, column, "failed" if state == "measured" else state, fallback)
        if "error" in told or "gone" in told:
            return
        self._progress(told["name"], probe.name, perf_counter() - begun)
        if state == "failed" and (gone := await _gone(lab)):
            told["gone"] = gone

    def _put(self, row_id: str, column: int, state: State, found: Found) -> None:
        entry = self._rows[row_id]
        support = _support(self._labs[column], entry["feature"])
        level = support.level if support is not None else "plain"
        entry["cells"][column] = {
            **cell(state, level, found.text),
            "value": found.value,
            "note": found.note,
            "declared": support.how if support is not None else "",
            "points": {name: [list(point) for point in curve] for name, curve in found.points.items()},
        }


def cell(state: State, level: str, text: str) -> dict[str, Any]:
    """`level`: native, emulated or refused as declared; plain: sending, receiving and settling, which all have to do."""
    return {
        "state": state,
        "level": level or "plain",
        "text": text,
        "value": None,
        "note": "",
        "declared": "",
        "points": {},
    }


def failures(document: Document) -> list[str]:
    """A line for each broker that could not be reached or has gone, and for each cell that failed otherwise."""
    targets = document["targets"]
    gone = [f"{target['name']}: can't be reached: {target['error']}" for target in targets if "error" in target]
    gone += [f"{target['name']}: the broker has gone: {target['gone']}" for target in targets if "gone" in target]
    return gone + [
        f"{targets[column]['name']}: {row['title']}: {found['text']}"
        for row in document["rows"]
        for column, found in enumerate(row["cells"])
        if found["state"] == "failed" and "error" not in targets[column]
    ]


def yours_first(row: Mapping[str, Any]) -> bool:
    """The key to sort rows by; the order of the others is kept."""
    return row["yours"] is False


def _names(probe: Probe | Declared) -> set[str]:
    if isinstance(probe, Declared):
        return {probe.row.id, probe.row.chapter}
    return {probe.name, *(name for row in probe.rows for name in (row.id, row.chapter))}


def known_names() -> set[str]:
    """What `only` may be made of."""
    return {contracts.CHAPTER}.union(*(_names(probe) for probe in ALL))


def _support(lab: Lab, feature: str | None) -> Support | None:
    """What is declared of a feature."""
    return None if feature is None or lab.capabilities is None else getattr(lab.capabilities, feature)


async def _gone(lab: Lab) -> str | None:
    """Why the broker, which was there when the run began, can't be reached any more. None: it can, or comes back."""
    deadline = perf_counter() + GONE
    while True:
        try:
            async with asyncio.timeout(GONE):
                await lab.connect()
        except (ConnectionError, TimeoutError) as error:
            if perf_counter() > deadline:
                return _said(error)
        except Exception:  # a refusal is an answer
            return None
        else:
            return None
        await asyncio.sleep(GONE / 10)


def _said(error: BaseException) -> str:
    """One line, and never a traceback: its frames hold URLs."""
    if isinstance(error, Missing):
        return str(error)
    if isinstance(error, BaseExceptionGroup):
        return _said(error.exceptions[0])
    return describe(error)


def _told(lab: Lab) -> dict[str, Any]:
    told = lab.target.told()
    return {
        "name": told["emulator"] or told["given"],
        "adapter": None,
        "version": None,
        "prefix": lab.prefix,
        "deleted": 0,
        "left": None,  # why what was made is still there
        **told,
    }


def _name(lab: Lab, labs: Collection[Lab], others: Collection[str]) -> str:
    """Of a column: the emulator's name where there is one; the file's, the settings' or the URL's where two would be the same."""
    known = lab.known
    name = lab.target.emulator or " ".join(filter(None, (known.adapter, known.version)))
    if lab.target.given.endswith(".toml"):
        name += f" ({lab.target.given})"
    elif settings := _own_settings(lab, labs):
        name += f" ({settings})"
    elif name in others:
        name += f" ({lab.target.given})"
    number, unique = 2, name
    while unique in others:
        unique, number = f"{name} #{number}", number + 1
    return unique


def _own_settings(lab: Lab, labs: Collection[Lab]) -> str:
    """By which it differs from other columns of the same URL."""
    own = lab.target.told()["settings"]
    twins = [other.target.told()["settings"] for other in labs if other.target.shown == lab.target.shown]
    return ", ".join(f"{key}={own[key]}" for key in own if any(twin.get(key) != own[key] for twin in twins))


def machine() -> dict[str, Any]:
    """Where: figures without this mean nothing."""
    return {
        "unibus": version("unibus"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()] if sys.platform != "win32" else None,
    }
