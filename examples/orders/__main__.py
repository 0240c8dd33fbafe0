"""The orders demo.

    python -m examples.orders                          all in one process, in memory
    python -m examples.orders --url amqp://localhost   the same on RabbitMQ

With the service in processes of its own, to be killed and started again at will:

    python -m examples.orders serve --url amqp://localhost --prefix try. --journal journal
    python -m examples.orders demo  --url amqp://localhost --prefix try. --journal journal --elsewhere
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from examples.orders.generate import DATA
from examples.orders.payments import Journal
from unibus import UnibusError

if TYPE_CHECKING:
    from examples.orders.demo import Demo


def main() -> int:
    options = _options()
    # The log says each failed payment, and the demo is about those.
    level = logging.INFO if options.verbose else logging.CRITICAL
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
    # The settings of the service, as its operators would give them.
    os.environ["UNIBUS_URL"] = options.url
    os.environ["UNIBUS_PREFIX"] = options.prefix
    try:
        if options.command == "serve":
            return _serve(options.journal)
        if options.journal is not None:
            return _demo(options, options.journal)
        with tempfile.TemporaryDirectory() as folder:
            return _demo(options, Path(folder, "journal"))
    except (UnibusError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _serve(path: Path) -> int:
    from examples.orders.service import bus

    os.environ["ORDERS_JOURNAL"] = str(path)
    asyncio.run(bus.run())
    return 0


def _demo(options: argparse.Namespace, path: Path) -> int:
    from examples.orders.demo import Demo

    os.environ["ORDERS_JOURNAL"] = str(path)
    journal = Journal(path)
    try:
        demo = Demo(options.file, journal, handlers=not options.elsewhere)
        good = asyncio.run(demo.run())
        if options.json is not None:
            options.json.write_text(json.dumps(_numbers(demo)), encoding="utf-8")
        return 0 if good else 1
    finally:
        journal.close()


def _numbers(demo: Demo) -> dict[str, dict[str, float]]:
    """What `everywhere` compares."""
    rows = demo.rows()
    actual = {name: got for name, _, got in rows} | {"delivered more than once": demo.again()}
    return {
        "expected": {name: want for name, want, _ in rows},
        "actual": {**actual, "seconds": round(demo.result.seconds, 1)},
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.orders", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("demo", "serve"), default="demo")
    url = os.environ.get("ORDERS_URL", "memory://")
    parser.add_argument("--url", default=url, help="the broker (default: that of ORDERS_URL, or memory://)")
    parser.add_argument("--prefix", help="before all names on the broker; default for `demo`: a new one each time")
    parser.add_argument("--journal", type=Path, help="file of the service's effects; default for `demo`: none is kept")
    parser.add_argument("--elsewhere", action="store_true", help="the handlers run in other processes, see `serve`")
    parser.add_argument("--file", type=Path, default=DATA, help="orders; what is expected of them stands beside it")
    parser.add_argument("--json", type=Path, help="write the numbers of `demo` to this file, too")
    parser.add_argument("--verbose", action="store_true", help="show the log")
    options = parser.parse_args()
    if options.command == "serve" or options.elsewhere:
        if options.prefix is None or options.journal is None:
            parser.error("name --prefix and --journal, the same for `serve` and `demo`")
        if options.url.startswith("memory:"):
            parser.error("memory:// ends with its process; use a broker, or `demo` without --elsewhere")
    options.prefix = options.prefix or f"demo-{secrets.token_hex(3)}."
    return options


if __name__ == "__main__":
    sys.exit(main())
