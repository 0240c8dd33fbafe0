"""SQS and SNS: ministack, an emulator, on one HTTP port. What passes on it has not passed on AWS."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from socket import create_connection
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

from .apt import cache_folder
from .broker import LOOPBACK, Command, Site, SupplyError, locked, tail

VERSION = "1.5.33"
REGION = "eu-west-1"
_TIMEOUT = 5.0


class SQS:
    name = "sqs"
    process = "ministack"
    emulator = "SQS/SNS on ministack"
    image = f"ministackorg/ministack:{VERSION}"
    ports: Sequence[str] = ("http",)
    private_ports: Sequence[str] = ()

    def install(self) -> None:
        """Into a virtual environment of its own: it pins another botocore than the adapter's client."""
        folder = _folder()
        with locked(folder.with_suffix(".lock")):
            if (folder / "installed").exists():
                return
            print(f"installing ministack {VERSION} into {folder}", file=sys.stderr)
            log = folder.with_suffix(".log")
            with log.open("w") as output:
                for command in (
                    [sys.executable, "-m", "venv", "--clear", str(folder)],
                    [str(folder / "bin/pip"), "install", "--disable-pip-version-check", f"ministack=={VERSION}"],
                ):
                    done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
                    if done.returncode:
                        raise SupplyError(f"ministack {VERSION} can't be installed; the end of the log:\n{tail(log)}")
            (folder / "installed").touch()

    def files(self, site: Site) -> Mapping[str, bytes]:
        return {}

    def native(self, site: Site) -> Command:
        folder = Path(site.folder)
        data = {"STATE_DIR": str(folder / "state"), "S3_DATA_DIR": str(folder / "s3"), "TMPDIR": str(folder)}
        return Command([str(_folder() / "bin/ministack")], {**_environment(site), **data})

    def container(self, site: Site) -> Command:
        return Command([], _environment(site))

    def variables(self, site: Site, files: Path) -> Mapping[str, str]:
        # wait=1: a consumer that stops waits for its long poll, and tests stop many.
        server = f"http://{LOOPBACK}:{site.ports['http']}"
        return {"URL": f"sqs://{site.user}:{site.password}@{REGION}?endpoint_url={server}&wait=1"}

    def settled(self, home: Path) -> bool:
        return True  # it only keeps what it has when it is told to end: a kill loses everything

    def check(self, url: str) -> None:
        parts = urlsplit(url)
        server = parse_qs(parts.query).get("endpoint_url")
        if server is None:  # AWS itself
            create_connection((f"sqs.{parts.hostname}.amazonaws.com", 443), _TIMEOUT).close()
            return
        self._ask(server[0])

    def tells(self, server: str) -> bool:
        """Whether what answers there says that it is ministack."""
        try:
            if urlsplit(server).scheme in {"http", "https"}:
                self._ask(server)
                return True
        except (OSError, ValueError, HTTPException):
            pass  # whatever it is
        return False

    def _ask(self, server: str) -> None:
        with urlopen(f"{server}/_ministack/health", timeout=_TIMEOUT) as answer:  # noqa: S310 - http, as the URL says
            if b'"sqs"' not in answer.read(1 << 16):
                raise ConnectionError(f"{server} answers, but not as ministack with SQS")


def _folder() -> Path:
    return cache_folder("ministack") / VERSION


def _environment(site: Site) -> dict[str, str]:
    return {
        "GATEWAY_PORT": str(site.ports["http"]),
        "BIND_HOST": site.address,
        "AUTH": "true",  # access keys and IAM policies are checked, signatures are not
        "AWS_ACCESS_KEY_ID": site.user,
        "AWS_SECRET_ACCESS_KEY": site.password,
        "MINISTACK_REGION": REGION,
        "SERVICES": "sqs,sns,sts,iam",
        "PERSIST_STATE": "1",
        "IOT_MTLS_ENABLED": "0",  # other services' own ports
        "SFTP_ENABLED": "0",
        "LOG_LEVEL": "WARNING",
    }
