"""Maintainers' command: resolves the broker's class path anew and writes ``jars.json``.

In: the coordinates in :data:`ROOTS`. Out: every jar that they need at run time, with SHA-256 and size. Run it after a
change of :data:`KAFKA_VERSION`::

    python -m magnatronic.broker.lock
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from magnatronic.broker.artifacts import sha256_of

__all__ = ["JARS", "KAFKA_VERSION", "ROOTS", "main"]

KAFKA_VERSION: Final = "4.3.1"
ROOTS: Final = (
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
    # Kafka logs through SLF4J 1.7 and names no binding; without one it is silent.
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4",
)
JARS: Final = Path(__file__).with_name("jars.json")


def main() -> None:
    """Writes ``jars.json`` next to this module."""
    from jgo.maven import MavenContext
    from jgo.parse import Endpoint

    pinned: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as repository:
        context = MavenContext(repo_cache=Path(repository), local_repos=[], timeout=60)
        # One at a time: resolved together, one root's managed versions would change the other's dependencies.
        needed = []
        for root in ROOTS:
            inputs = [
                context.create_dependency(replace(coordinate, scope="compile"))
                for coordinate in Endpoint.parse(root).coordinates
            ]
            roots, transitive = context.resolver.resolve(inputs)
            needed += [*roots, *(dependency for dependency in transitive if dependency.scope in ("compile", "runtime"))]
        chosen: dict[tuple[str, str], Any] = {}
        for dependency in needed:
            chosen.setdefault((dependency.groupId, dependency.artifactId), dependency)
        for dependency in chosen.values():
            artifact = dependency.artifact
            path = Path(artifact.resolve())
            coordinate = f"{artifact.groupId}:{artifact.artifactId}:{artifact.version}"
            pinned[coordinate] = {"coordinate": coordinate, "sha256": sha256_of(path), "size": path.stat().st_size}
    document = {"purpose": f"Apache Kafka {KAFKA_VERSION}", "artifacts": [pinned[name] for name in sorted(pinned)]}
    JARS.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{len(pinned)} jars, {sum(jar['size'] for jar in pinned.values()) / 1e6:.1f} MB -> {JARS.name}")


if __name__ == "__main__":
    main()
