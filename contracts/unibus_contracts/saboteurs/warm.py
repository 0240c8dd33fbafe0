"""What every trial needs, imported once, in the process that they are forked from. Not the suite: pytest rewrites its asserts."""

from . import leap  # noqa: F401, I001  # first, before anything has taken the time
import pytest_asyncio.plugin  # noqa: F401
import pytest_timeout  # noqa: F401

import unibus.testing  # noqa: F401

from . import factory  # noqa: F401
