"""Forgetting a data subject for good: its key is destroyed, then the log says so, and projections delete.

In: a subject's name, the key store, the cluster. Out: :class:`Forgotten`: which key ids it had, and what each
projection deleted. The key goes first: from then on no process that does not remember it can read anything, and what is
written later, by whoever, is blank. The other way round a crash in between would leave the log readable though
projections, and whoever reads the event, believe it is not. SubjectForgotten names the key id and has an id of its own
that depends on nothing else, so that this can be done again after a crash, or for good measure, and says the same.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import KafkaException, Producer

from magnatronic.control import call
from magnatronic.discovery import FoundSystem
from magnatronic.errors import ClusterError, ControlError, NotRunningError, WrongInputError
from magnatronic.keys.store import SubjectKeys
from schemas.codec import Codec, Encoded
from schemas.encryption import SubjectCipher
from schemas.events import SubjectForgotten
from schemas.metadata import Metadata, deterministic_id
from streams.forgotten import PRIVACY_TOPIC, ForgottenSubjects
from streams.kafka import producer_settings

if TYPE_CHECKING:
    from magnatronic.roles import Workbench

__all__ = ["Erasure", "Forgotten", "erasures", "forget", "forgets", "known_ids"]

_SEND_S: Final = 30.0
_POLL_S: Final = 0.5
_FILES_S: Final = 90.0


@dataclass(frozen=True, slots=True)
class Erasure:
    """What a projection has done: ``rows`` were blanked or deleted, and ``files`` hold nothing of them any more. Either
    is None where nobody could be asked.
    """

    projection: str
    rows: int | None = None
    files: bool | None = None

    @property
    def done(self) -> bool:
        """Whether it said that it has done all."""
        return self.rows is not None and self.files is not False


@dataclass(slots=True)
class Forgotten:
    """``destroyed`` of the subject's ``key_ids`` were destroyed now, the others before."""

    key_ids: tuple[str, ...]
    destroyed: int = 0
    erasures: list[Erasure] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether every projection has done its part."""
        return all(erasure.done for erasure in self.erasures)


def known_ids(keys: SubjectKeys, subject: str) -> tuple[str, ...]:
    """The subject's key ids, those destroyed before too.

    Raises:
        WrongInputError: the key store never heard of it.
    """
    ids = keys.ids_of(subject)
    if not ids:
        raise WrongInputError(
            f"the key store {keys.place} has no data subject {subject!r}; names are written as they were submitted"
        )
    return ids


def forget(
    found: FoundSystem,
    codec: Codec,
    keys: SubjectKeys,
    subject: str,
    *,
    by: str,
    timeout_s: float = 120.0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Forgotten:
    """Destroy the subject's keys, tell everybody, and wait for what the projections say.

    Raises:
        WrongInputError: the key store never heard of it.
        KeyStoreError: a key could not be destroyed; do it again.
        ClusterError: the keys are destroyed, but Kafka did not take the event; do it again.
    """
    done = Forgotten(known_ids(keys, subject))
    on_progress("destroying the key")
    for key_id in done.key_ids:
        done.destroyed += keys.destroy(key_id)
    on_progress("telling the log")
    _tell(found.kafka, codec, done.key_ids, by)
    on_progress("waiting for ClickHouse and Milvus")
    done.erasures = _wait(found, done.key_ids, timeout_s)
    return done


def _tell(kafka: dict[str, Any], codec: Codec, key_ids: Iterable[str], by: str) -> None:
    failures: list[str] = []

    def delivered(error: Any, _: Any) -> None:
        if error is not None:
            failures.append(error.str())

    producer = Producer({**producer_settings(kafka, "forget"), "delivery.timeout.ms": int(_SEND_S * 1000)})
    again = "the keys are destroyed; run it again to have the projections delete"
    try:
        for key_id in key_ids:
            value, headers = _event(codec, key_id, by)
            producer.produce(PRIVACY_TOPIC, value, key_id.encode(), headers=headers, on_delivery=delivered)
        left = producer.flush(_SEND_S + 5)
    except KafkaException as error:
        raise ClusterError(f"Kafka refuses a record for {PRIVACY_TOPIC}: {error.args[0].str()}; {again}") from error
    if failures or left:
        servers = kafka.get("bootstrap.servers")
        raise ClusterError(f"Kafka at {servers} did not take it: {(failures or ['no acknowledgement'])[0]}; {again}")


def _event(codec: Codec, key_id: str, by: str) -> Encoded:
    metadata = Metadata(
        id=deterministic_id("SubjectForgotten", key_id),
        source=f"/clients/{by}",
        subject=key_id,
        time=datetime.now(UTC),
        correlation_id=key_id,
    )
    return codec.encode(SubjectForgotten(key_id=key_id, requested_by=by), metadata)


def _wait(found: FoundSystem, key_ids: Sequence[str], timeout_s: float) -> list[Erasure]:
    """What the projections say, asked of the running system, or of servers where none runs here."""
    from magnatronic.roles import Workbench

    settings = found.settings
    try:
        said = call(
            settings.data_dir,
            "forgotten",
            key_ids=list(key_ids),
            timeout_s=timeout_s,
            timeout=timeout_s + _FILES_S + 30,
        )
        return [Erasure(**each) for each in said]
    except NotRunningError:
        pass
    except ControlError:
        return [Erasure("clickhouse"), Erasure("milvus")]
    workbench = Workbench(settings)
    try:
        return erasures(
            workbench,
            key_ids,
            timeout_s,
            clickhouse=settings.clickhouse_url is not None,
            milvus=settings.milvus_uri is not None,
        )
    finally:
        workbench.close()


def forgets(workbench: "Workbench", kafka: dict[str, Any], codec: Codec) -> ForgottenSubjects:
    """What has a process drop all that it remembers of those who are forgotten: keys, and texts with their vectors."""

    def drop(key_id: str) -> None:
        if isinstance(codec.cipher, SubjectCipher):
            codec.cipher.drop(key_id)
        workbench.forget_texts()

    return ForgottenSubjects(kafka, codec, drop)


def erasures(
    workbench: "Workbench", key_ids: Sequence[str], timeout_s: float, *, clickhouse: bool = True, milvus: bool = True
) -> list[Erasure]:
    """Wait until the stores say that they have forgotten these key ids. Blocks. A store that can't be asked here, as
    another process has it, is not.
    """
    from sinks.clickhouse.forgetting import erased_rows as blanked_rows
    from sinks.clickhouse.forgetting import wait_for_old_files
    from sinks.milvus.forgetting import erased_rows as deleted_rows

    deadline = time.monotonic() + timeout_s
    made = []
    if clickhouse:
        store = workbench.clickhouse()
        rows = _until(lambda: blanked_rows(store, key_ids), key_ids, deadline)
        files = rows is not None and wait_for_old_files(store, max(deadline - time.monotonic(), _FILES_S))
        made.append(Erasure("clickhouse", rows, files))
    else:
        made.append(Erasure("clickhouse"))
    if milvus:
        index = workbench.milvus()
        index.open()
        try:
            rows = _until(lambda: deleted_rows(index, key_ids), key_ids, deadline)
        finally:
            index.close()
        # A server deletes compacted segments when it likes.
        made.append(Erasure("milvus", rows, True if rows is not None and index.embedded else None))
    else:
        made.append(Erasure("milvus"))
    return made


def _until(ask: Callable[[], dict[str, int]], key_ids: Sequence[str], deadline: float) -> int | None:
    while True:
        rows = ask()
        if rows.keys() >= set(key_ids):
            return sum(rows.values())
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL_S)
