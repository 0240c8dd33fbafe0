"""The plots of docs/performance.md, as small SVG files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

from benchmarks.goals import BASES
from benchmarks.growth import VARIABLES

if TYPE_CHECKING:
    from benchmarks.page import Runs

FOLDER = Path(__file__).parent.parent / "docs" / "performance"

mpl.use("svg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "unibus", "font.size": 8, "axes.titlesize": 9})


def draw(runs: Runs) -> list[Path]:
    """Those for which something was measured."""
    FOLDER.mkdir(exist_ok=True)
    made = []
    if brokers := [broker for broker in BASES if f"{broker}: send" in runs.cases]:
        made.append(_rates(runs, brokers))
    if runs.grown:
        made += [_growth(runs, "CPU µs", "CPU a unit of work, µs"), _growth(runs, "MB", "memory grown, MB")]
    return made


def _rates(runs: Runs, brokers: list[str]) -> Path:
    """Messages a second of each contestant, and the range of its rounds."""
    figure, axes = _figure(2, len(brokers), (3 * len(brokers), 4.5))
    for column, broker in enumerate(brokers):
        for row, direction in enumerate(("send", "consume")):
            plot = axes[row][column]
            found = runs.cases[f"{broker}: {direction}"]["contestants"]
            rates = {name: own["messages/s"] for name, own in reversed(found.items())}
            medians = [own["median"] for own in rates.values()]
            ends = [
                [o["median"] - o["lowest"] for o in rates.values()],
                [o["highest"] - o["median"] for o in rates.values()],
            ]
            colors = ["tab:blue" if name.startswith("unibus") else "silver" for name in rates]
            plot.barh(list(rates), medians, xerr=ends, color=colors, error_kw={"elinewidth": 0.8})
            plot.set_title(f"{broker}: {direction}, messages/s")
            plot.ticklabel_format(axis="x", style="plain")
            plot.tick_params(axis="x", rotation=30)
    return _saved(figure, "rates.svg")


def _growth(runs: Runs, key: str, label: str) -> Path:
    figure, axes = _figure(2, 3, (9, 5))
    for number, variable in enumerate(VARIABLES):
        plot = axes[number // 3][number % 3]
        for _, own in runs.grown:
            if own["variable"] == variable.name and own["points"]:
                ns = [point["n"] for point in own["points"]]
                plot.plot(ns, [point[key] for point in own["points"]], marker=".", label=own["broker"])
        plot.set_xscale("log")
        plot.set_yscale("log" if key != "MB" else "linear")
        plot.set_title(f"{variable.name}" + (f", a {variable.unit}" if key != "MB" else ""))
    axes[0][0].set_ylabel(label)
    axes[1][0].set_ylabel(label)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5)
    return _saved(figure, "growth-cpu.svg" if key != "MB" else "growth-memory.svg")


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, axes


def _saved(figure: Any, name: str) -> Path:
    from matplotlib import pyplot as plt

    path = FOLDER / name
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
