"""Install what a native broker needs from the packages of Debian or Ubuntu, without starting their services."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .broker import SupplyError, locked, tail

POLICY = Path("/usr/sbin/policy-rc.d")


def cache_folder(name: str) -> Path:
    """Where downloads stay between runs."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "unibus" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def install(*packages: str) -> None:
    """Install `packages`. Needs apt-get and root, and says so otherwise."""
    names = " ".join(packages)
    if shutil.which("apt-get") is None:
        raise SupplyError(
            f"{names} is not installed, and there is no apt-get here to install it with; install it by hand"
        )
    if os.geteuid() != 0:
        raise SupplyError(
            f"{names} is not installed; install it as root: apt-get install --no-install-recommends {names}"
        )
    cache = cache_folder("apt")
    (cache / "partial").mkdir(exist_ok=True)
    log = cache / "apt.log"
    options = [
        *("-o", f"Dir::Cache::Archives={cache}"),
        *("-o", "APT::Keep-Downloaded-Packages=true"),
        *("-o", "APT::Sandbox::User=root"),  # apt's own user can't write to root's cache folder
        *("-o", "DPkg::Lock::Timeout=300"),  # another apt may be at work
    ]
    with locked(cache / "lock"), log.open("w") as output:
        print(f"installing {names} with apt-get (log: {log})", file=sys.stderr)

        def apt(*arguments: str) -> int:
            return subprocess.run(
                ["apt-get", *options, *arguments],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode

        # A third-party source that doesn't answer fails the update but not our packages: only the install decides.
        apt("update", "--quiet")
        with services_stay_down():
            status = apt("install", "--quiet", "--yes", "--no-install-recommends", *packages)
    if status != 0:
        raise SupplyError(f"apt-get install {names} failed with status {status}; the end of its log:\n{tail(log)}")


@contextlib.contextmanager
def services_stay_down() -> Iterator[None]:
    """Debian starts a service as it installs it: RabbitMQ's would listen on every interface, as guest. Forbid that."""
    if POLICY.exists():  # a container image's own, which forbids it as well
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")  # "action forbidden by policy"
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()
