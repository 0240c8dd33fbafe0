"""The command line: `unibus`. Needs the extra `cli`; nothing else of unibus imports it.

Each command is one module in `commands`, found by being there; see `commands/__init__.py`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The script `unibus`, and `python -m unibus`."""
    try:
        from unibus.cli.app import run

        run()
    except KeyboardInterrupt:  # before there was a command to hear it: the imports take a second
        print("unibus: interrupted", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.exit(f"unibus: the command line needs {error.name!r}, which is not installed; pip install 'unibus[cli]'")
