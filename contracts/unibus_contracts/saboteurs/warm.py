"""What every trial needs, imported once, in the process that they are forked from. Not the suite: pytest rewrites its asserts."""

from . import leap  # noqa: F401, I001  # first, before anything has taken the time
import pytest_asyncio.plugin  # noqa: F401
import pytest_timeout  # type: ignore[import-untyped]  # noqa: F401  # it ships no types

import unibus.blocking
import unibus.config
import unibus.testing  # noqa: F401
import unibus_contracts.plugin  # noqa: F401

from . import factory  # noqa: F401
