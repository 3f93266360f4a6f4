"""Archives the log of a system: put together from the system that is found, and vouched for in topic ``audit``.

In: a system, an archive's folder, name and topics. Out: what a run archived; after each run that added something the
archive's head goes to topic ``audit`` as a LogArchived, so that an archive can be held against what was said of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient

from magnatronic.discovery import FoundSystem
from magnatronic.errors import ClusterError
from magnatronic.finished import finished_offsets
from magnatronic.settings import Settings
from replay.archive import Archived, Archiver, Header, LeftSealed, Manifest
from replay.kafka_log import KafkaLog
from replay.log import Progress
from replay.selection import Selection
from schemas.codec import Codec
from schemas.errors import DecodeError
from schemas.events import LogArchived
from schemas.metadata import Metadata, deterministic_id
from schemas.topics import topic_of
from streams.interpreter import collecting_seldom
from streams.kafka import producer_settings

__all__ = ["Archiving", "announced_heads", "archive", "cluster_id", "keyless_codec"]

_AUDIT: Final = topic_of(LogArchived).name
_ANNOUNCED: Final = "announced"
_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Archiving:
    """What is to be archived, and where to. ``topics`` empty are all event topics."""

    folder: Path
    name: str
    topics: tuple[str, ...] = ()
    allow_gaps: bool = False


def archive(found: FoundSystem, what: Archiving, on_progress: Progress | None = None) -> Archived:
    """Archive all that the system's log holds by now, and say so in topic ``audit``.

    Raises:
        ArchiveError: the folder holds another archive, retention was quicker, or another process writes it.
        LogReadError: the log can't be read.
        ClusterError: the cluster does not answer, or refuses the announcement.
    """
    codec = keyless_codec(found.settings)
    header = Header(what.name, cluster_id(found), tuple(sorted(what.topics)))
    with (
        collecting_seldom(),
        KafkaLog(found.kafka) as log,
        Archiver(
            what.folder,
            header,
            log,
            codec,
            finished=lambda: finished_offsets(found.kafka),
            allow_gaps=what.allow_gaps,
        ) as archiver,
    ):
        done = archiver.run(on_progress)
        _announce(found, codec, archiver.manifest)
    return done


def keyless_codec(settings: Settings) -> Codec:
    """The codec without keys of data subjects: what it decodes holds nothing personal."""
    if settings.schema_registry_url is None:
        return Codec(cipher=LeftSealed())
    from schemas.registry import RegistryIds

    return Codec(RegistryIds(settings.schema_registry_url), cipher=LeftSealed())


def cluster_id(found: FoundSystem) -> str:
    """The id that the Kafka cluster gave itself.

    Raises:
        ClusterError: it does not answer.
    """
    try:
        return str(AdminClient({"log_level": 2, **found.kafka}).list_topics(timeout=_TIMEOUT_S).cluster_id or "")
    except KafkaException as error:
        raise ClusterError(f"Kafka at {found.kafka.get('bootstrap.servers')}: {error.args[0].str()}") from error


def announced_heads(found: FoundSystem, header: Header) -> set[str]:
    """The heads that topic ``audit`` has of this archive.

    Raises:
        LogReadError: the topic can't be read.
    """
    codec = keyless_codec(found.settings)
    heads = set()
    with KafkaLog(found.kafka) as log:
        for batch in log.read(Selection(topics=frozenset({_AUDIT}), event_types=frozenset({"LogArchived"}))):
            for record in batch.records:
                try:
                    event = codec.decode(record).event
                except DecodeError:
                    continue  # somebody else's; what is in it says nothing of this archive
                if isinstance(event, LogArchived) and (event.archive, event.cluster) == (header.name, header.cluster):
                    heads.add(event.head)
    return heads


def _announce(found: FoundSystem, codec: Codec, manifest: Manifest) -> None:
    """Say the head in topic ``audit``, once: what was sent and not noted is sent again under the same id."""
    noted = manifest.folder / _ANNOUNCED
    if not manifest.segments or (noted.is_file() and noted.read_text() == manifest.head):
        return
    header = manifest.header
    event = LogArchived(
        source=f"archive/{header.name}",
        archive=header.name,
        cluster=header.cluster,
        segments=len(manifest.segments),
        records=sum(segment.records for segment in manifest.segments),
        head=manifest.head,
    )
    metadata = Metadata(
        id=deterministic_id("LogArchived", header.cluster, header.name, manifest.head),
        source="/clients/archive",
        subject=event.source,
        time=datetime.now(UTC),
    )
    encoded = codec.encode(event, metadata)
    _send(found.kafka, _AUDIT, event.source.encode(), encoded.value, encoded.headers)
    partial = noted.with_suffix(".partial")
    partial.write_text(manifest.head)
    partial.replace(noted)


def _send(kafka: dict[str, Any], topic: str, key: bytes, value: bytes, headers: Iterable[tuple[str, bytes]]) -> None:
    failures: list[str] = []

    def delivered(error: Any, _: Any) -> None:
        if error is not None:
            failures.append(error.str())

    producer = Producer({**producer_settings(kafka, "archive"), "delivery.timeout.ms": int(_TIMEOUT_S * 1000)})
    try:
        producer.produce(topic, value, key, headers=list(headers), on_delivery=delivered)
        left = producer.flush(_TIMEOUT_S + 5)
    except KafkaException as error:
        raise ClusterError(f"Kafka refuses a record for {topic}: {error.args[0].str()}") from error
    if failures or left:
        raise ClusterError(
            f"Kafka at {kafka.get('bootstrap.servers')} did not take what vouches for the archive: "
            f"{failures[0] if failures else 'no acknowledgement'}; the archive is written, run it again to say so"
        )
