"""Adapters are found by entry points, imported late, and missing ones say what to install."""

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from unibus import registry
from unibus.errors import ConfigError
from unibus.memory import MemoryAdapter


class Distribution:
    def __init__(self, name: str) -> None:
        self.name = name


def entry(scheme: str, value: str, distribution: str = "unibus") -> EntryPoint:
    made = EntryPoint(scheme, value, registry.GROUP)
    vars(made)["dist"] = Distribution(distribution)
    return made


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that these entry points are installed."""

    def install(*entries: EntryPoint) -> None:
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: EntryPoints(entries))
        registry._entries.cache_clear()
        registry.adapter_factory.cache_clear()

    yield install
    registry._entries.cache_clear()
    registry.adapter_factory.cache_clear()


def test_the_memory_adapter_is_found() -> None:
    assert registry.adapter_factory("memory") is MemoryAdapter
    assert registry.adapter_factory("memory") is registry.adapter_factory("memory")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("unibus.memory:MemoryAdapter", "memory"),
        ("unibus_rabbitmq:RabbitMQAdapter", "rabbitmq"),
        ("unibus_redis.adapter:RedisAdapter", "redis"),
        ("acme_bus:Adapter", "acme_bus"),
    ],
)
def test_the_section_comes_from_the_package(installed: Any, value: str, name: str) -> None:
    installed(entry("x", value))
    assert registry.broker_name("x") == name
    assert registry.broker_names() == {name}


def test_names_are_known_without_importing_anything(installed: Any) -> None:
    installed(entry("amqp", "unibus_absent:A"), entry("amqps", "unibus_absent:A"), entry("x", "unibus_y:B"))
    assert registry.broker_names() == {"absent", "y"}
    assert registry.schemes() == ("amqp", "amqps", "x")
    assert "unibus_absent" not in sys.modules


def test_an_unknown_scheme_lists_the_known_ones_and_the_nearest(installed: Any) -> None:
    installed(entry("amqp", "unibus_rabbitmq:A"), entry("memory", "unibus.memory:MemoryAdapter"))
    for call in (registry.adapter_factory, registry.broker_name):
        with pytest.raises(ConfigError, match=r"no adapter for amqo://; did you mean amqp://\?.*amqp://, memory://"):
            call("amqo")
    with pytest.raises(ConfigError, match="no adapter for zzz://; known here: amqp://, memory://"):
        registry.adapter_factory("zzz")


def test_one_adapter_seen_twice_is_one_and_two_are_refused(installed: Any) -> None:
    twice = entry("memory", "unibus.memory:MemoryAdapter")
    installed(twice, entry("memory", "unibus.memory:MemoryAdapter"))
    assert registry.adapter_factory("memory") is MemoryAdapter
    installed(twice, entry("memory", "other:Adapter", "acme-bus"))
    with pytest.raises(ConfigError, match=r"memory:// is claimed by .* of unibus and other:Adapter of acme-bus"):
        registry.adapter_factory("memory")


@pytest.mark.parametrize(
    ("source", "value", "distribution", "text"),
    [
        ("import lib_x", "unibus_t:A", "unibus", "needs the module 'lib_x'.*pip install 'unibus\\[t\\]'"),
        ("import lib_x.sub", "unibus_t:A", "unibus", "'lib_x.*pip install 'unibus\\[t\\]'"),
        ("import lib_x", "unibus_t:A", "acme", "needs the module 'lib_x'.*distribution acme requires"),
        ("from json import nothing", "unibus_t:A", "unibus", "can't use the installed module 'json'.*unibus\\[t\\]"),
        ("from unibus_t import nothing", "unibus_t:A", "unibus", "not complete.*reinstall unibus"),
        ("", "unibus_t:A", "unibus", "unibus_t:A of unibus does not exist.*reinstall"),
    ],
)
def test_an_adapter_that_does_not_import_says_what_to_do(
    installed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    value: str,
    distribution: str,
    text: str,
) -> None:
    (tmp_path / "unibus_t.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "lib_x", None)
    monkeypatch.delitem(sys.modules, "unibus_t", raising=False)
    installed(entry("t", value, distribution))
    with pytest.raises(ConfigError, match=f"^t://: .*{text}") as caught:
        registry.adapter_factory("t")
    assert caught.value.__cause__ is not None
    sys.modules.pop("unibus_t", None)


def test_an_installed_adapter_without_its_client(tmp_path: Path) -> None:
    """Through real metadata, in a process of its own."""
    metadata = tmp_path / "unibus-9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: unibus\nVersion: 9\n")
    (metadata / "entry_points.txt").write_text("[unibus.adapters]\nstub = unibus_stub:Adapter\n")
    (tmp_path / "unibus_stub.py").write_text("import aio_pika")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.modules["aio_pika"] = None
from unibus.registry import adapter_factory, broker_name
from unibus.errors import ConfigError
assert broker_name("stub") == "stub"
try:
    adapter_factory("stub")
except ConfigError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs the module 'aio_pika', which is not installed; pip install 'unibus[stub]'" in done.stdout


def test_looking_names_up_imports_no_adapter_and_no_client() -> None:
    code = """
import sys
from unibus.registry import broker_names
assert "memory" in broker_names()
loaded = [m for m in sys.modules if m.startswith(("unibus_", "unibus.memory", "aio_pika", "aiormq"))]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # our own code
