"""`unibus contracts`: run the contract suite, and look at what it promises."""

from __future__ import annotations

import asyncio
import importlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from unibus.cli import output
from unibus.cli.run import FAILED, UNREACHABLE, USAGE, Failure, command
from unibus.cli.target import JsonOption
from unibus.errors import ConfigError
from unibus.registry import broker_name
from unibus.url import parse

Like = Annotated[str | None, typer.Option("--like", "-k", metavar="TEXT", help="Only those whose id contains this.")]

Mode = Literal["create", "assume"]

_OUTCOMES = {
    "passed": "kept",
    "refused-as-declared": "refused as declared",
    "failed": "broken",
    "not-tried": "not tried",
    "not-run": "not run",
}
_MOST = 6  # lines of an error
_CHECK = 30.0  # seconds in which a broker has to answer before the run


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="The contract suite: run, list, show.", no_args_is_help=True)
    for function, name in ((run, "run"), (list_, "list"), (show, "show")):
        group.command(name=name)(command(function))
    app.add_typer(group, name="contracts")


def run(
    urls: Annotated[
        list[str], typer.Argument(metavar="URL...", help="The brokers, or unibus.toml files; one run each.")
    ],
    like: Like = None,
    workers: Annotated[int, typer.Option("--workers", "-n", min=1, help="Processes that share the work.")] = 1,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the outcomes, as JSON; of several brokers, into a folder."),
    ] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="The same as JUnit XML; of one broker.")] = None,
    pin: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Fail where answers differ from those.")] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Begins every name on the broker; something random follows.")
    ] = None,
    channels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what the contracts need, as a unibus.toml; of one broker."),
    ] = None,
    declare: Annotated[
        Mode, typer.Option(help="assume: make nothing, and use what --channels lists and somebody has made.")
    ] = "create",
    restart: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND", help="Of the shell: restarts the broker, for the contracts on that; not with -n."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Every contract on each of these brokers: kept, refused as declared, broken.

    All that is made is deleted at the end, after Ctrl-C too.
    """
    chosen = [place for _, place in _known(like)]
    if junit is not None and len(urls) > 1:
        raise ConfigError("--junit: name one broker, or take --report")
    if channels is not None and len(urls) > 1:
        raise ConfigError("--channels: name one broker")
    if restart is not None and len(urls) > 1:
        raise ConfigError("--restart: name one broker")
    if restart is not None and workers > 1:
        raise ConfigError("--restart: not with -n, since it would strike the contracts of the other processes")
    if prefix is not None and not _suite("cleaner").PREFIX.fullmatch(prefix):
        raise ConfigError(f"--prefix {prefix!r}: use {_suite('cleaner').PREFIX_RULE}")
    reports = _files(urls, report)
    if channels is not None and declare == "create":
        output.writable(channels)
    for file in (junit, *reports):
        if file is not None:
            output.writable(file)
            _forget(file)
    arguments = [] if workers == 1 else ["-n", str(workers)]
    arguments += [] if pin is None else [f"--unibus-pin={pin}"]
    arguments += [] if prefix is None else [f"--unibus-prefix={prefix}"]
    arguments += [] if channels is None else [f"--unibus-channels={channels}"]
    arguments += [] if restart is None else [f"--unibus-restart={restart}"]
    arguments += [f"--unibus-declare={declare}"]
    for url in urls:
        _check(url)
    wrong = False
    for url, file in zip(urls, reports, strict=True):
        wrong |= _one(url, arguments, chosen, file, junit, as_json=as_json)
    if wrong:
        raise typer.Exit(FAILED)


def list_(like: Like = None, as_json: JsonOption = False) -> None:
    """All contracts: id, chapter, the feature that it needs, and what it promises."""
    found = [terms for terms, _ in _known(like)]
    if as_json or output.piped():
        for terms in found:
            output.write_json(terms.as_dict())
        return
    output.table(("id", "needs", "promise"), [(terms.id, terms.capability or "", terms.promise) for terms in found])


def show(
    id: Annotated[str, typer.Argument(metavar="ID", help="As `list` has it.")], as_json: JsonOption = False
) -> None:
    """One contract: its promise, the feature that it needs, and what it assumes of the broker."""
    catalogue = _suite("catalogue")
    known = catalogue.catalogue()
    if id not in known:
        from difflib import get_close_matches

        near = get_close_matches(id, known, n=1)
        raise Failure(f"there is no contract {id!r}; {f'did you mean {near[0]}?' if near else 'see the list'}")
    terms, place = known[id]
    needs = terms.capability or "nothing: every adapter keeps it"
    assumes = " ".join(filter(None, (catalogue.ALWAYS, terms.assumes)))
    if as_json:
        output.write_json({**terms.as_dict(), "assumes": assumes, "test": place})
        return
    rows = {"promise": terms.promise, "chapter": terms.chapter, "needs": needs, "assumes": assumes, "test": place}
    print("\n".join([terms.id, *(f"  {name + ':':9} {text}" for name, text in rows.items())]))


def _known(like: str | None) -> list[tuple[Any, str]]:
    """The terms and the place of each contract that `--like` takes. Raises ConfigError: none."""
    known = _suite("catalogue").catalogue()
    found = [both for id, both in known.items() if like is None or like in id]
    if not found:
        raise ConfigError(f"--like: no contract has {like!r} in its id; see `unibus contracts list`")
    return found


def _forget(file: Path) -> None:
    """What an earlier run has written: this one may end before it has anything to write. A device or a pipe is let be."""
    if file.is_symlink() and file.is_file():
        file.write_text("")  # what it points to, not the link: that could be /dev/stdout
    elif file.is_file():
        file.unlink()


def _suite(module: str) -> Any:
    """A module of the suite. Raises ConfigError where the extra is missing."""
    try:
        for needed in ("pytest_asyncio", "pytest_timeout", "xdist"):
            importlib.import_module(needed)
        return importlib.import_module(f"unibus_contracts.{module}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the contract suite needs {error.name!r}, which is not installed; pip install 'unibus[contracts]'"
        ) from error


def _check(url: str) -> None:
    """Raises what the broker says, before the same is said of each contract."""
    harness, where, more = _suite("harness"), url, {}
    if _suite("__main__").of_file(url):
        try:
            where, more = harness.of_file(Path(url))
        except OSError as error:
            raise ConfigError(f"{url} can't be read: {error.strerror}") from error
    broker_name(parse(where).scheme)
    seconds = _CHECK * _suite("kit").FACTOR

    async def connect() -> None:
        try:
            async with asyncio.timeout(seconds) as limit, harness.UrlHarness(where, more=more).bus():
                pass
        except TimeoutError:
            if not limit.expired():  # a client's own
                raise
            raise Failure(
                f"{harness.shown(where)} does not answer: no link within {seconds:g} s", UNREACHABLE
            ) from None

    asyncio.run(connect())


def _files(urls: Sequence[str], report: Path | None) -> list[Path | None]:
    if report is None:
        return [None] * len(urls)
    if len(urls) == 1:
        return [report]
    return list(_suite("__main__").report_paths(urls, report))


def _one(
    url: str, arguments: Sequence[str], tests: Sequence[str], file: Path | None, junit: Path | None, *, as_json: bool
) -> bool:
    """One broker; is anything wrong?"""
    runner, reports = _suite("runner"), _suite("report")
    shown = _suite("harness").shown(url)
    with output.progress(f"contracts on {shown}", len(tests)) as advance:
        try:
            found, interrupted = runner.run(
                *(url, lambda _id, _outcome: advance(1), *arguments), tests=tests, report=file, junit=junit
            )
        except runner.Broken as error:
            raise Failure(f"the run on {shown} has broken off:\n{error}", USAGE) from None
    if as_json:
        output.write_json(found)
    else:
        _print(found, reports)
    if interrupted:
        raise KeyboardInterrupt
    return bool(reports.problems(found))


def _print(found: dict[str, Any], reports: Any) -> None:
    counts: dict[str, Counter[str]] = {}
    entries = [entry for entry in found["contracts"] if entry["outcome"] != "not-run" or not found["finished"]]
    for entry in entries:
        counts.setdefault(entry["chapter"], Counter())[entry["outcome"]] += 1
    total = sum(counts.values(), Counter())
    columns = [
        outcome for outcome in _OUTCOMES if outcome in ("passed", "refused-as-declared", "failed") or total[outcome]
    ]
    rows = [(chapter, *(counts[chapter][one] or "" for one in columns)) for chapter in sorted(counts)]
    rows.append(("in all", *(total[one] for one in columns)))
    output.table(("chapter", *(f">{_OUTCOMES[one]}" for one in columns)), rows)
    for entry in found["contracts"]:
        if entry["outcome"] == "failed":
            said = entry.get("error", "").splitlines()[:_MOST]
            print("\n  ".join([f"broken: {entry['id']}: {entry['promise']}", *said]))
    for text in [*reports.beside(found), *reports.untried(found), *found.get("cleanup", ())]:
        print(text)
    print(reports.line(found))
