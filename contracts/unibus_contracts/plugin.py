"""The pytest plugin: options, the fixtures of a contract, and the report. It imports only pytest when it is loaded."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .channels import Listed
    from .cleaner import Cleaner
    from .contract import Terms
    from .harness import Harness
    from .kit import Kit

pytest.register_assert_rewrite("unibus_contracts.kit", "unibus_contracts.refusals", "unibus_contracts.spi")

MOST_SAID = 2000  # characters of an error in the report
LEFT = "unibus_left"  # in what a worker of xdist tells at its end
MORE = 15  # seconds of a test beyond its contract's own limit, which says more: for setup and teardown


class _Run:
    """What this process knows of the run. Under xdist only the controller's is complete; it hears by reports."""

    def __init__(self) -> None:
        self.contracts: dict[str, dict[str, Any]] = {}
        self.outcomes: dict[str, tuple[str, float]] = {}
        self.errors: dict[str, str] = {}
        self.capabilities: dict[str, Any] | None = None
        self.noted: dict[str, Any] = {}  # contract -> the channels it had
        self.cleaner: Cleaner | None = None  # where there is a broker to clean
        self.left: list[str] = []  # what a harness of the adapter's own could not delete, and why


_RUN = pytest.StashKey[_Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("unibus", "unibus contract suite")
    group.addoption("--unibus-url", metavar="URL", help="the broker to run the contracts on, for example memory://")
    group.addoption("--unibus-report", metavar="FILE", help="write the outcome of every contract to this file, as JSON")
    group.addoption("--unibus-steps", metavar="FILE", help="append [id, outcome] to this file after each contract")
    group.addoption("--unibus-config", metavar="FILE", help="a unibus.toml with url, user and settings of the broker")
    group.addoption("--unibus-pin", metavar="FOLDER", help="fail where a run differs from the answers pinned in FOLDER")
    group.addoption(
        "--unibus-channels",
        metavar="FILE",
        help="write what the contracts need to FILE; with assume, use what it lists",
    )
    group.addoption(
        "--unibus-declare", choices=("create", "assume"), default="create", help="assume: make nothing on the broker"
    )
    group.addoption(
        "--unibus-prefix", metavar="TEXT", help="begin every name on the broker with this; something random follows"
    )
    group.addoption(
        "--unibus-restart",
        metavar="COMMAND",
        help="a command of the shell that restarts the broker, with what it had, for the contracts on that; not with -n",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RUN] = run = _Run()
    config.option.unibus_url = config.getoption("--unibus-url") or os.environ.get("UNIBUS_CONTRACTS_URL")
    assume, channels = config.getoption("--unibus-declare") == "assume", config.getoption("--unibus-channels")
    if not hasattr(config, "workerinput"):
        _check_writable(config, "--unibus-report")
        if channels and not assume:
            _check_writable(config, "--unibus-channels")
        if assume and not channels:
            raise pytest.UsageError(
                "--unibus-declare assume needs --unibus-channels FILE; a run without --unibus-declare writes it"
            )
        if assume and config.getoption("--unibus-prefix"):
            raise pytest.UsageError(f"--unibus-prefix: under assume the prefix is the one in {channels}")
        if config.getoption("--unibus-restart") and config.getoption("numprocesses", None):
            raise pytest.UsageError("--unibus-restart: not with -n, since it would strike the contracts of the others")
    url, file = config.getoption("--unibus-url"), config.getoption("--unibus-config")
    if url or file:
        # It warns who has no configuration of its own, and whoever runs this suite alone has none.
        warnings.filterwarnings("ignore", 'The configuration option "asyncio_default_fixture_loop_scope"')
        from .cleaner import PREFIX, PREFIX_RULE, Cleaner

        if not PREFIX.fullmatch(config.getoption("--unibus-prefix") or ""):
            raise pytest.UsageError(f"--unibus-prefix {config.getoption('--unibus-prefix')!r}: use {PREFIX_RULE}")
        more: dict[str, Any] = {}
        if file:
            if url and not hasattr(config, "workerinput"):  # a worker of xdist is given what came of it, too
                raise pytest.UsageError("give --unibus-url or --unibus-config, not both")
            url, more = _of_file(Path(file))
        config.option.unibus_url = url
        listed = _listed(Path(channels)) if assume else None
        run.cleaner = Cleaner(config, url, more, noting=bool(channels), listed=listed)
        config.pluginmanager.register(run.cleaner, "unibus-contracts-cleaner")
    config.pluginmanager.register(_Recorder(config), "unibus-contracts-recorder")


def _check_writable(config: pytest.Config, option: str) -> None:
    """Now, not after ten minutes of contracts."""
    if path := config.getoption(option):
        there = os.path.lexists(path)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).open("a").close()
            if not there:
                Path(path).unlink()  # nothing has been written yet
        except OSError as error:
            raise pytest.UsageError(f"{option} {path} can't be written: {error}") from error


def _listed(path: Path) -> Listed:
    from unibus import ConfigError

    from .channels import read

    try:
        return read(path)
    except ConfigError as error:
        raise pytest.UsageError(f"--unibus-channels: {error}") from None


def _of_file(path: Path) -> tuple[str, dict[str, Any]]:
    from unibus import ConfigError

    from .harness import of_file

    try:
        return of_file(path)
    except (OSError, ValueError, ConfigError) as error:
        raise pytest.UsageError(f"--unibus-config {path}: {error}") from None


def _terms(item: pytest.Item) -> Terms | None:
    terms: Terms | None = getattr(getattr(item, "function", None), "__unibus_contract__", None)
    return terms


# First, so that contracts which -k or -m takes out are reported as not run.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = config.stash[_RUN].contracts
    for item in items:
        terms = _terms(item)
        if terms is None:
            continue
        if terms.id in known:
            raise pytest.UsageError(f"two contracts have the id {terms.id}")
        known[terms.id] = terms.as_dict()
        item.user_properties.append(("unibus_contract", terms.as_dict()))
        if config.pluginmanager.hasplugin("timeout"):
            from .contract import limit_of
            from .kit import FACTOR

            item.add_marker(pytest.mark.timeout(limit_of(item) + MORE * FACTOR))
    if known:
        # Read now what the report needs: at the end a finalizer of what a test has left may strike the compiler, which Python
        # 3.11.7 does not survive ("AST constructor recursion depth mismatch"), and the report would be lost.
        from .catalogue import catalogue

        catalogue()


@pytest.fixture(scope="session")
def unibus_harness(request: pytest.FixtureRequest) -> Harness:
    """The broker to test. Override it for a harness that can do more."""
    cleaner = request.config.stash[_RUN].cleaner
    if cleaner is None:
        raise pytest.UsageError("contracts need a broker: give --unibus-url, for example --unibus-url memory://")
    return cleaner.harness()


@pytest.fixture(scope="session")
def _unibus_shared(request: pytest.FixtureRequest, unibus_harness: Harness) -> Iterator[dict[str, Any]]:
    import asyncio

    from .cleanup import Removal, not_deleted
    from .harness import UrlHarness

    yield {}
    try:
        asyncio.run(unibus_harness.cleanup())
        removal = getattr(unibus_harness, "removal", None)
    except Exception as error:  # no contract has failed by it
        removal = Removal(0, f"{type(error).__name__}: {error}")
    if removal is None:
        return
    run = request.config.stash[_RUN]
    if run.cleaner is not None:
        run.cleaner.note(removal)
    mine = isinstance(unibus_harness, UrlHarness) and unibus_harness.made.journal is not None
    if removal.left is not None and not mine:  # else the main process tries once more, and tells
        run.left.append(not_deleted(unibus_harness.prefix, removal.left))
        if hasattr(request.config, "workeroutput"):
            request.config.workeroutput[LEFT] = run.left


@pytest.fixture
def kit(request: pytest.FixtureRequest, unibus_harness: Harness, _unibus_shared: dict[str, Any]) -> Iterator[Kit]:
    from .channels import NamedHarness, NotingHarness
    from .kit import Kit

    terms = _terms(request.node)
    if isinstance(unibus_harness, NamedHarness):
        unibus_harness.begin(terms.id if terms is not None else request.node.name)
    elif request.config.getoption("--unibus-channels"):
        raise pytest.UsageError(f"--unibus-channels: give --unibus-url, since {unibus_harness} makes names of its own")

    def note(name: str, value: object) -> None:
        request.node.user_properties.append((name, value))

    yield Kit(unibus_harness, _unibus_shared, note)
    if isinstance(unibus_harness, NotingHarness):
        note("unibus_noted", unibus_harness.noted)


def _said(report: pytest.TestReport) -> str:
    """What went wrong, without the traceback: its frames hold URLs."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longreprtext)[:MOST_SAID]


def _line(entry: Any) -> int | None:
    line: int | None = entry._rawentry.tb_lineno  # what typeshed takes for an int
    return line


class _Recorder:
    """Hears every report, of this process or of xdist's workers, and writes the file at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._run = config.stash[_RUN]
        self._finished = False
        self._gone: str | None = None  # why the broker can't be reached any more
        self._broken_off: str | None = None  # why the run ends before its time
        self._interrupted = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def _stop(self, why: str) -> None:
        """Whatever else is run says nothing. A worker of xdist stops by itself, with what it has queued."""
        if self._broken_off is None:
            self._broken_off = why
            running = self._config.pluginmanager.getplugin("dsession") or self._session
            running.shouldstop = why

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        terms: Any = properties.get("unibus_contract")
        if terms is None:
            return
        from .report import FAILED, NOT_RUN, NOT_TRIED, PASSED, REFUSED

        id = terms["id"]
        self._run.contracts.setdefault(id, terms)
        if "unibus_capabilities" in properties:
            self._run.capabilities = properties["unibus_capabilities"]  # type: ignore[assignment] # our own note
        if "unibus_gone" in properties:
            self._gone = self._gone or str(properties["unibus_gone"])
            self._stop(f"the broker has gone: {self._gone}")
        if "unibus_unusable" in properties:
            self._stop(str(properties["unibus_unusable"]))
        if "unibus_noted" in properties:
            self._run.noted[id] = properties["unibus_noted"]
        outcome, seconds = self._run.outcomes.get(id, (NOT_RUN, 0.0))
        if report.failed:
            outcome = FAILED
            self._run.errors.setdefault(id, _said(report))
        elif report.skipped and "unibus_not_tried" in properties:
            outcome = NOT_TRIED
            self._run.errors[id] = str(properties["unibus_not_tried"])
        elif report.when == "call" and report.passed and outcome != FAILED:
            outcome = REFUSED if "unibus_refused" in properties else PASSED
        self._run.outcomes[id] = (outcome, seconds + report.duration)
        steps = self._config.getoption("--unibus-steps")
        if steps and report.when == "teardown" and not hasattr(self._config, "workerinput"):
            with Path(steps).open("a", encoding="utf-8") as file:
                file.write(json.dumps([id, outcome]) + "\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self._interrupted = True
        # Python 3.11 has no line for a function that was just being entered. pytest stumbles over that, and ends as if all were done.
        excinfo.traceback = excinfo.traceback.filter(lambda entry: _line(entry) is not None)

    def pytest_report_teststatus(self, report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str, str] | None:
        if report.when == "call" and report.passed and "unibus_refused" in dict(report.user_properties):
            return "refused as declared", "r", "REFUSED AS DECLARED"
        return None

    def _report(self) -> dict[str, Any] | None:
        url = self._config.getoption("--unibus-url")
        if not self._run.contracts or hasattr(self._config, "workerinput"):
            return None
        from .catalogue import catalogue
        from .harness import shown
        from .report import build

        contracts, suite = self._run.contracts, catalogue()
        if any(id in suite for id in contracts):  # of which the controller of xdist knows only what it has heard of
            contracts = {id: terms.as_dict() for id, (terms, _) in suite.items()} | contracts
        outcomes, capabilities, errors = self._run.outcomes, self._run.capabilities, self._run.errors
        report = build(
            *(shown(url or "harness"), contracts, outcomes, capabilities),
            finished=self._finished,
            errors=errors,
            declare=self._config.getoption("--unibus-declare"),
            gone=self._gone,
            broken_off=self._broken_off,
        )
        if folder := self._config.getoption("--unibus-pin"):
            from .pins import differences

            report["differs"] = differences(Path(folder), report)
        return report

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self._run.left += (getattr(node, "workeroutput", None) or {}).get(LEFT, ())

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        through = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        self._finished = through and not (session.shouldstop or self._interrupted)
        path = self._config.getoption("--unibus-report")
        from .report import write

        report = self._report()
        wrong = report is not None and (report["unexercised"] or report["differs"])
        if wrong and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        self._write_channels()
        if report is not None and path:  # before anything is cleaned up, which may take its time, or be broken off
            write(Path(path), report)

    def _write_channels(self) -> None:
        """Of a part of the contracts, only of those; of a run that was broken off, none: it would look like all."""
        path, assume = (
            self._config.getoption("--unibus-channels"),
            self._config.getoption("--unibus-declare") == "assume",
        )
        if not path or assume or not self._run.noted or not self._finished:
            return
        from .channels import write
        from .cleaner import DEFAULT

        known, noted = self._run.contracts, self._run.noted
        prefix = self._config.getoption("--unibus-prefix") or DEFAULT
        write(Path(path), prefix, [(id, known[id]["promise"], noted[id]) for id in sorted(noted)])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        report = self._report()
        if report is None:
            return
        from .report import line, problems, untried, write

        cleaner = self._run.cleaner
        deleted = cleaner.deleted if cleaner else 0
        report["left"] = [*self._run.left, *(cleaner.left if cleaner else ())]
        report["cleanup"] = [*([f"deleted on the broker: {deleted} objects"] if deleted else []), *report["left"]]
        terminalreporter.write_sep("=", "unibus contracts")
        terminalreporter.write_line(line(report))
        for said in [*problems(report), *untried(report)]:
            terminalreporter.write_line(f"  {said}")
        if folder := self._config.getoption("--unibus-pin"):
            from .pins import unpinned

            if note := unpinned(Path(folder), report):
                terminalreporter.write_line(f"  {note}")
        for said in report["cleanup"]:
            terminalreporter.write_line(said)
        if path := self._config.getoption("--unibus-report"):
            write(Path(path), report)
        if xml := self._config.getoption("xmlpath", None):
            from .junit import complete

            file = Path(os.path.expandvars(xml)).expanduser()  # as pytest does
            if file.exists():
                complete(file, report)
