"""Runs the old snippets of docs/from-faststream.md and docs/from-celery.md: are they what such services really look like?

Not a part of `make test`, since neither is a dependency. In an environment that has them:

    python tests/migration/old_snippets.py docs/from-faststream.md docs/from-celery.md

Only the standard library and what the snippets import are needed. A section's snippets share their names; those that
await run at FastStream's test broker, Celery's at its memory transport, eager. Prints each section, fails at the first error.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from importlib import import_module
from pathlib import Path
from types import CodeType
from typing import Any

EAGER = """
if type(app).__name__ == "Celery":
    app.conf.update(broker_url="memory://", result_backend="cache+memory://")
    app.conf.update(task_always_eager=True, task_store_eager_result=True)
"""


def sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """Heading and old snippets; the first are those that all begin with."""
    for part in re.split(r"^## ", f"\n{text}", flags=re.MULTILINE):
        title = part.partition("\n")[0]
        yield title, re.findall(r"^```python old\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)


def compiled(sources: list[str], title: str) -> tuple[list[CodeType], list[CodeType]]:
    """What defines, and what awaits: in each snippet, from its first statement that awaits on."""
    defining, awaiting = [], []
    for source in sources:
        statements = ast.parse(source).body
        first = next((i for i, statement in enumerate(statements) if awaits(statement)), len(statements))
        defining.append(compile(ast.Module(statements[:first], []), title, "exec"))
        rest = ast.Module(statements[first:], [])
        awaiting.append(compile(rest, title, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT))
    return defining, [code for code in awaiting if code.co_flags & inspect.CO_COROUTINE]


def awaits(statement: ast.stmt) -> bool:
    code = compile(ast.Module([statement], []), "", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    return bool(code.co_flags & inspect.CO_COROUTINE)


async def on_the_test_broker(names: dict[str, Any], awaiting: list[CodeType]) -> None:
    broker = names["broker"]
    kind = type(broker).__name__.removesuffix("Broker")
    tested = getattr(import_module(f"faststream.{kind.lower()}"), f"Test{kind}Broker")
    async with AsyncExitStack() as stack:
        if "test_charge" not in names:  # it opens the test broker itself
            await stack.enter_async_context(tested(broker))
        for code in awaiting:
            await eval(code, names)  # noqa: S307  # that is the job
        if "test_charge" in names:
            await names["test_charge"]()


def run(path: Path) -> None:
    eager = compile(EAGER, "eager", "exec")
    (_, prelude), *rest = sections(path.read_text(encoding="utf-8"))
    for title, sources in rest:
        if not sources:
            continue
        names: dict[str, Any] = {"__name__": "old"}
        before, _ = compiled(prelude, f"{path.name}: all")
        defining, awaiting = compiled(sources, f"{path.name}: {title}")
        for code in [*before, eager, *defining]:
            exec(code, names)  # noqa: S102  # that is the job
        if "broker" in names:
            asyncio.run(on_the_test_broker(names, awaiting))
        elif "test_charge" in names:
            names["test_charge"]()
        print(f"{path.name}: {title}")  # noqa: T201  # a command prints


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Path(name))
