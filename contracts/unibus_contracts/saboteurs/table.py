"""From trials to a table, and to what is wrong. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .base import Hardship, Saboteur
from .run import Trial


def verdicts(
    saboteurs: Sequence[Saboteur],
    known: Sequence[str],
    control: Trial,
    results: Mapping[str, Trial],
    basics: Sequence[str],
    *,
    complete: bool,
) -> tuple[list[str], list[str]]:
    """The table, a saboteur a paragraph, and what is wrong, a line each. `complete`: all saboteurs were tried."""
    table, wrong, killed = [], [], set[str]()
    tried = {id for saboteur in saboteurs for id in (*saboteur.kills, *results[saboteur.name].outcomes)}
    sick = [id for id in known if id in tried and id not in control.kept]
    if sick:
        wrong.append(f"without a saboteur these are broken, so that no catch proves anything: {', '.join(sick)}")
        wrong.append(control.output)
    for saboteur in saboteurs:
        result = results[saboteur.name]
        caught = result.caught_by
        killed.update(caught)
        table += [f"{saboteur.name} ({result.seconds:.1f} s): {saboteur.bug}", *(f"    {id}" for id in caught)]
        if missed := [id for id in saboteur.kills if id not in caught]:
            wrong.append(f"{saboteur.name} is not caught by {', '.join(missed)}")
            if not result.outcomes:
                wrong.append(result.output)
        if not set(basics) & set(result.kept):
            wrong.append(f"{saboteur.name} breaks everything, which proves nothing of any contract")
    alive = [id for id in known if id not in killed]
    table.append(f"{len(saboteurs)} saboteurs; {len(killed)} of {len(known)} contracts have caught one")
    if complete and alive:
        wrong.append(f"no saboteur is caught by {', '.join(alive)}")
    return table, wrong


def hardships_borne(hardships: Sequence[Hardship], results: Mapping[str, Trial]) -> tuple[list[str], list[str]]:
    """The table of what has to be kept all the same, and what was not, with what pytest said."""
    table, wrong = [], []
    for hardship in hardships:
        result = results[hardship.name]
        table += [f"{hardship.name} ({result.seconds:.1f} s), to be borne: {hardship.what}"]
        if missed := [id for id in hardship.keeps if id not in result.kept]:
            wrong += [f"{hardship.name} is not borne, by {', '.join(missed)}", result.output]
    return table, wrong
