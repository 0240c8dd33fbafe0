"""Measuring one stretch: wall time, CPU time of this process, and, when asked for, a profile."""

from __future__ import annotations

import cProfile
import gc
import io
import math
import pstats
import re
from pathlib import Path
from time import perf_counter, process_time

_LINES = 45


class Watch:
    """Between `start` and `stop`. Several stretches with one watch add up in the profile, not in the times."""

    def __init__(self, profile: cProfile.Profile | None = None) -> None:
        self.wall = 0.0
        self.cpu = 0.0
        self._profile = profile

    def start(self) -> None:
        # Nobody pays for another's garbage, nor for the modules of all the others, which a full collection would go through each time.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        if self._profile is not None:
            self._profile.enable()
        self._cpu_at, self._wall_at = process_time(), perf_counter()

    def restart(self) -> None:
        """What was until now is not counted."""
        self._cpu_at, self._wall_at = process_time(), perf_counter()

    def told(self, seconds: float) -> None:
        """By another process that has measured itself."""
        self.wall, self.cpu = seconds, math.nan

    def stop(self) -> None:
        self.wall, self.cpu = perf_counter() - self._wall_at, process_time() - self._cpu_at
        if self._profile is not None:
            self._profile.disable()

    def figures(self, messages: int) -> dict[str, float]:
        """Of a throughput case. `busy`: how much of the time this process computed; the rest it waited."""
        if math.isnan(self.cpu):
            return {"messages/s": messages / self.wall}
        return {
            "messages/s": messages / self.wall,
            "CPU µs/message": self.cpu / messages * 1e6,
            "busy %": self.cpu / self.wall * 100,
        }


def resident(field: str = "VmRSS") -> float:
    """Memory of this process in MB, of /proc; not a number where there is none. `VmHWM`: the most it was."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return math.nan
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else math.nan


class Profiles:
    """One profile for each named stretch; nothing at all unless switched on."""

    def __init__(self, *, on: bool) -> None:
        self._on = on
        self._profiles: dict[str, tuple[cProfile.Profile, int]] = {}

    def __bool__(self) -> bool:
        return self._on

    def of(self, name: str, messages: int) -> cProfile.Profile | None:
        if not self._on:
            return None
        profile, before = self._profiles.get(name) or (cProfile.Profile(), 0)
        self._profiles[name] = (profile, before + messages)
        return profile

    def text(self) -> str:
        """The functions with the most time of their own. cProfile adds to every call, so read it as shares."""
        out = io.StringIO()
        for name, (profile, messages) in self._profiles.items():
            out.write(f"=== {name}: {messages} messages\n")
            pstats.Stats(profile, stream=out).strip_dirs().sort_stats("tottime").print_stats(_LINES)
        return out.getvalue()
