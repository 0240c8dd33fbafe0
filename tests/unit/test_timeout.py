"""That a test that hangs ends, whatever its event loop makes of the first timeout."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
pytest_plugins = ["pytester"]

HANGS = """
    import asyncio
    import time

    import pytest


    @pytest.mark.timeout(0.5)
    async def test_hangs():
        def busy():  # here the first timeout strikes: the loop logs it, and goes on
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                pass

        asyncio.get_running_loop().call_soon(busy)
        await asyncio.Event().wait()
"""


def test_a_timeout_that_the_loop_swallowed_comes_again(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(HANGS)
    pytester.makeini("[pytest]\nasyncio_mode = auto\n")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", timeout=60)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*Failed: Timeout*"])
