"""The part of the plugin that knows what a run makes on the broker, and sees to it that it is deleted at the end.

Each process deletes what it has made and notes how much that was. What is left after all of them have ended, because one was
killed or was refused, the main process deletes.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest

from .channels import AssumingHarness, Listed, NotingHarness
from .cleanup import Removal, not_deleted, read, remove
from .harness import UrlHarness

JOURNAL, DELETED = ".journal", ".deleted"  # files of one process: what it makes; how much it has deleted
DEFAULT = "ctr-"
# What a bus takes as its prefix, less what the run and each process of it put behind.
PREFIX = re.compile(r"[A-Za-z0-9._-]{0,46}")
PREFIX_RULE = "letters, digits, '.', '_' and '-', 46 of them at most"


class Cleaner:
    """`deleted`, `left`: what came of it, once the session has finished.

    `noting`: what the contracts need is noted; `listed`: in place of making anything, what that lists is used.
    """

    def __init__(
        self, config: pytest.Config, url: str, more: Mapping[str, Any], *, noting: bool, listed: Listed | None
    ) -> None:
        self.url, self._more, self._noting, self._listed = url, more, noting, listed
        given: dict[str, Any] | None = getattr(config, "workerinput", None)  # of xdist, in a worker
        self._main = given is None
        if given is None:
            self.beginning = f"{config.getoption('--unibus-prefix') or DEFAULT}{secrets.token_hex(3)}."
            self._folder = Path(tempfile.mkdtemp(prefix="unibus-contracts-"))
        else:
            self.beginning, self._folder = given["unibus_beginning"], Path(given["unibus_folder"])
        self._restart: str | None = config.getoption("--unibus-restart")
        self.deleted = 0
        self.left: list[str] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput |= {"unibus_beginning": self.beginning, "unibus_folder": str(self._folder)}

    def pytest_report_header(self) -> str:
        if self._listed is not None:
            return f"unibus: what {self._listed.path} lists is used; nothing is made, and nothing but messages deleted"
        return (
            f"unibus: every name on the broker begins with {self.beginning!r}; all that is made is deleted at the end"
        )

    def harness(self) -> UrlHarness:
        """For this process."""
        if self._listed is not None:
            return AssumingHarness(self.url, self._listed, more=self._more, restart=self._restart)
        kind = NotingHarness if self._noting else UrlHarness
        journal = self._folder / f"{os.getpid()}{JOURNAL}"
        return kind(self.url, self.beginning, more=self._more, journal=journal, restart=self._restart)

    def note(self, removal: Removal) -> None:
        """A harness of this process has cleaned up."""
        if removal.left is None:
            (self._folder / f"{os.getpid()}{DELETED}").write_text(str(removal.deleted))

    # The innermost: after the fixtures of this process and the workers of xdist have ended, before the summary.
    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self) -> Generator[None, None, None]:
        try:
            return (yield)
        finally:
            if self._main:
                self._finish()

    def _finish(self) -> None:
        try:
            self.deleted = sum(int(file.read_text()) for file in self._folder.glob(f"*{DELETED}"))
            for journal in sorted(self._folder.glob(f"*{JOURNAL}")):
                for made in read(journal):
                    try:
                        removal = asyncio.run(remove(self.harness().bus(), made))
                    except KeyboardInterrupt:
                        self.left.append(not_deleted(made.prefix, "interrupted"))
                        return
                    self.deleted += removal.deleted
                    if removal.left is not None:
                        self.left.append(not_deleted(made.prefix, removal.left))
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
