"""What the package shows, and what importing it costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import unibus

CORE = Path(unibus.__file__).parent
CLIENTS = {"aio_pika", "aiormq", "pika", "aiokafka", "kafka", "botocore", "aiobotocore", "boto3", "redis"}
HEAVY = {"pydantic", "pydantic_settings", "pydantic_core", "typer", "opentelemetry", "tomllib"}


def test_all_is_sorted_complete_and_public() -> None:
    names = unibus.__all__
    assert names == sorted(names)
    assert len(names) == len(set(names))
    assert all(hasattr(unibus, name) for name in names)
    from types import ModuleType

    shown = {n for n, v in vars(unibus).items() if not n.startswith("_") and not isinstance(v, ModuleType)}
    assert shown == set(names)


def test_every_error_is_public() -> None:
    from unibus import errors

    kinds = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.UnibusError)}
    assert kinds <= set(unibus.__all__)


@pytest.mark.parametrize("path", sorted(CORE.glob("*.py")), ids=lambda p: p.name)
def test_the_core_imports_no_broker_library_and_no_adapter(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        for name in imported:
            root = name.partition(".")[0]
            assert root not in CLIENTS, path.name
            assert not root.startswith("unibus_"), path.name


def loaded(program: str) -> set[str]:
    code = f"{program}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )  # our own program
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_unibus_loads_nothing_heavy() -> None:
    modules = loaded("import unibus")
    assert not modules & (HEAVY | CLIENTS)
    assert not {m for m in modules if m.startswith("unibus_")}
    assert not modules & {"unibus.config", "unibus.memory", "unibus.testing", "unibus.cli"}


def test_making_a_bus_and_its_handlers_loads_nothing_heavy() -> None:
    modules = loaded(
        "from unibus import Bus, Queue\n"
        "bus = Bus('amqp://host')\n"
        "@bus.consumer(Queue('q', int))\n"
        "async def handle(body: int) -> None: ...\n"
    )
    assert not modules & (HEAVY | CLIENTS)
    assert not {m for m in modules if m.startswith("unibus_")}


def test_the_package_is_typed() -> None:
    assert (CORE / "py.typed").exists()
