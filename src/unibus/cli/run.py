"""From a function to a command: an event loop, signals, and errors as one line and an exit code.

0    done
1    not done, or not all of it: no such queue, refused, some messages not sent; doctor found something wrong
2    the command line, a setting or the application is wrong
3    the broker can't be reached, or does not answer: the same command may succeed later
4    the broker knows us not, or we may not do this
130  interrupted (Ctrl-C); 143 by SIGTERM
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import typer

from unibus.deadletter import describe
from unibus.errors import (
    AuthenticationFailed,
    Closed,
    CodecError,
    ConfigError,
    PermissionDenied,
    UnibusError,
    Unsupported,
)

FAILED, USAGE, UNREACHABLE, DENIED = 1, 2, 3, 4
BROKEN_PIPE = 128 + signal.SIGPIPE


class Failure(UnibusError):
    """Ends a command with one line and an exit code."""

    def __init__(self, text: str, code: int = FAILED) -> None:
        super().__init__(text)
        self.code = code


def code_of(error: UnibusError) -> int:
    """The exit code for an error."""
    if isinstance(error, Failure):
        return error.code
    if isinstance(error, ConfigError | Unsupported | CodecError | Closed):
        return USAGE
    if isinstance(error, AuthenticationFailed | PermissionDenied):
        return DENIED
    return UNREACHABLE if error.retryable else FAILED


def complain(text: str) -> None:
    print(f"unibus: {text}", file=sys.stderr, flush=True)


def command(function: Callable[..., Any], *, own_log: bool = False) -> Callable[..., None]:
    """`function` as a typer command. `own_log`: it sets up logging itself."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        if not own_log:
            _log_plainly()
        try:
            if inspect.iscoroutinefunction(function):
                asyncio.run(_interruptible(function(*args, **kwargs)))
            else:
                function(*args, **kwargs)
            sys.stdout.flush()
        except UnibusError as error:
            complain(str(error))
            raise typer.Exit(code_of(error)) from None
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(128 + signal.SIGINT) from None
        except BrokenPipeError:  # `unibus peek orders | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
            raise typer.Exit(BROKEN_PIPE) from None
        except OSError as error:
            complain(str(error))
            raise typer.Exit(FAILED) from None
        except typer.Exit:
            raise
        except Exception as error:
            _unexpected(error)

    return run


async def _interruptible(work: Coroutine[Any, Any, None]) -> None:
    """SIGTERM ends it like Ctrl-C does: what is under way is wound up."""
    task = asyncio.ensure_future(work)
    terminated = False

    def terminate() -> None:
        nonlocal terminated
        terminated = True
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
    try:
        await task
    except asyncio.CancelledError:
        if not terminated:
            raise
        complain("terminated")
        raise typer.Exit(128 + signal.SIGTERM) from None


def _log_plainly() -> None:
    """What unibus has to say, on stderr, and not what its clients say of the same; `run` sets up its own."""
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.addFilter(logging.Filter("unibus"))
        logging.basicConfig(level=logging.WARNING, format="unibus: %(message)s", handlers=[handler])


def _unexpected(error: Exception) -> NoReturn:
    """Of the application (its lifespan), or of unibus itself: where it happened has to be said."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    complain(f"{describe(error)}{where}")
    raise typer.Exit(FAILED) from None
