"""Jars from Maven Central, by Maven, into the cache folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from . import apt
from .broker import SupplyError, locked, tail

_POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>unibus</groupId>
  <artifactId>test-broker</artifactId>
  <version>1</version>
  <dependencies>
{dependencies}
  </dependencies>
</project>
"""


def folder(name: str) -> Path:
    """Where `install` puts them: `libs` in it has all jars."""
    return apt.cache_folder(name)


def install(name: str, *jars: str) -> None:
    """These jars, each "group:artifact:version", and all they need; and a Java that runs them."""
    if shutil.which("java") is None:
        apt.install("openjdk-17-jre-headless")
    place = folder(name)
    with locked(place / "lock"):
        if not (place / "complete").exists():
            _download(place, jars)


def _download(place: Path, jars: tuple[str, ...]) -> None:
    if shutil.which("mvn") is None:
        apt.install("maven")
    dependencies = [
        "    <dependency><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version></dependency>".format(
            *jar.split(":")
        )
        for jar in jars
    ]
    (place / "pom.xml").write_text(_POM.format(dependencies="\n".join(dependencies)))
    log = place / "maven.log"
    print(f"downloading {place.name} with Maven (log: {log})", file=sys.stderr)
    command = ["mvn", "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=libs", "-DincludeScope=runtime"]
    with log.open("w") as output:
        done = subprocess.run(command, cwd=place, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise SupplyError(f"Maven could not download {place.name}; the end of its log:\n{tail(log)}")
    (place / "complete").touch()
