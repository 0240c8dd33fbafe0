"""Brokers as containers, where a Docker engine answers. Ports are published on loopback only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .broker import LOOPBACK, Kind, Record, Site, SupplyError

FOLDER = "/etc/unibus"  # where a container finds its configuration
_SOCKET = "unix:///var/run/docker.sock"


class Docker:
    source = "docker"
    address = "0.0.0.0"  # noqa: S104 - inside the container; what is published is on loopback

    def unavailable(self) -> str | None:
        """Why no container can be started here; None when one can."""
        from docker.errors import DockerException

        # Looked at first: docker-py leaks its socket when there is no engine, and tests turn that warning into an error.
        place = os.environ.get("DOCKER_HOST", _SOCKET)
        if place.startswith("unix://") and not Path(place.removeprefix("unix://")).is_socket():
            return f"there is no Docker engine at {place}"
        try:
            with _engine():
                return None
        except (DockerException, OSError) as error:
            return f"no Docker engine answers ({error})"

    def folder(self, home: Path) -> str:
        return FOLDER

    def create(self, kind: Kind, site: Site, home: Path, files: Mapping[str, bytes]) -> None:
        from docker.errors import DockerException
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.container import DockerContainer

        # Its reaper would remove the container as soon as `up` ends; ours goes with `down`.
        testcontainers_config.ryuk_disabled = True
        command = kind.container(site)
        container = DockerContainer(kind.image, name=site.node).with_kwargs(hostname="localhost")
        container.with_envs(**command.environment)
        if command.argv:
            container.with_command(list(command.argv))
        for name in kind.ports:
            # Docker takes (address, port) as well, testcontainers only types the port.
            container.ports[f"{site.ports[name]}/tcp"] = (LOOPBACK, site.ports[name])  # type: ignore[assignment]
        for name, content in files.items():
            # A container's server runs as a user of its own, so everyone may read; the key is worth nothing.
            container.with_copy_into_container(content, f"{FOLDER}/{name}", 0o644)
        try:
            container.start()
        except (DockerException, OSError) as error:  # OSError: what requests raises
            raise SupplyError(f"{kind.image}: {error}") from error

    def resume(self, kind: Kind, record: Record, home: Path) -> None:
        with _container(record) as container:
            container.start()

    def pid(self, kind: Kind, record: Record, home: Path) -> int | None:
        with _container(record) as container:
            return int(container.attrs["State"]["Pid"]) or None

    def running(self, record: Record, home: Path) -> bool:
        from docker.errors import NotFound

        try:
            with _container(record) as container:
                return bool(container.status == "running")
        except NotFound:
            return False

    def kill(self, kind: Kind, record: Record, home: Path) -> None:
        with _container(record) as container:
            container.kill()
            container.wait()

    def terminate(self, kind: Kind, record: Record, home: Path) -> None:
        with _container(record) as container:
            container.stop(timeout=30)

    def pause(self, kind: Kind, record: Record, home: Path) -> None:
        with _container(record) as container:
            container.pause()

    def unpause(self, kind: Kind, record: Record, home: Path) -> None:
        with _container(record) as container:
            container.unpause()

    def remove(self, record: Record | None, home: Path) -> None:
        from docker.errors import NotFound

        if record is None:
            return
        try:
            with _container(record) as container:
                container.remove(force=True, v=True)
        except NotFound:  # somebody removed it by hand
            return

    def complaint(self, record: Record, home: Path) -> str:
        with _container(record) as container:
            log = container.logs(tail=30).decode(errors="replace")
        return f"its container's log:\n{log}"


# docker-py has no types, hence Any.
@contextlib.contextmanager
def _engine() -> Iterator[Any]:
    import docker

    with contextlib.closing(docker.from_env(timeout=120)) as client:
        client.ping()
        yield client


@contextlib.contextmanager
def _container(record: Record) -> Iterator[Any]:
    with _engine() as client:
        yield client.containers.get(record.site.node)
