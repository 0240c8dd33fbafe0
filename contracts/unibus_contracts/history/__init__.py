"""What happened, written down while it happens, and whether that kept the promises. After how Jepsen tests queues.

`record` appends operations to a file per process; `check` reads them all and judges; `python -m unibus_contracts.history FOLDER`
prints the verdict.
"""

from .check import Expected, Finding, Verdict, check
from .record import History, Operation, Recorder, Tail

__all__ = ["Expected", "Finding", "History", "Operation", "Recorder", "Tail", "Verdict", "check"]
