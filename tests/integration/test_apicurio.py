"""Against a real Apicurio Registry and Kafka: stock Confluent clients read what we wrote, and we what they wrote."""

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.schema_registry import SchemaRegistryClient, record_subject_name_strategy
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from schemas.avro_generation import avsc_text, parsed_schema, shipped_types
from schemas.avro_schema import RecordType, parse
from schemas.codec import Codec, Encoded
from schemas.errors import RegistryError, UnknownSchemaError
from schemas.events import (
    ChunkEmbedded,
    Citation,
    Claim,
    Event,
    Evidence,
    Priority,
    StepCompleted,
    TaskSubmitted,
)
from schemas.metadata import Metadata, deterministic_id
from schemas.record import Record
from schemas.registry import Manifest, ManifestIds, RegistryIds, SchemaIds


class Kafka(Protocol):
    """What these tests use of the fixture."""

    config: dict[str, Any]

    def topic(self, prefix: str) -> str: ...

    def unique(self, prefix: str) -> str: ...


NOW = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=UTC)
META = Metadata(deterministic_id("one"), "/agents/tester@1", "t1", NOW, deterministic_id("zero"), "t1")
EVENTS: list[Event] = [
    TaskSubmitted(task_id="t1", objective="ask", priority=Priority.HIGH, deadline=NOW, parameters={"b": "2", "a": "1"}),
    TaskSubmitted(task_id="t2", objective="é" * 9000),
    StepCompleted(
        task_id="t1",
        step_id="t1/1",
        attempt=1,
        capability="research",
        objective="o",
        answer="a",
        claims=(Claim(text="c", chunk_ids=("x", "y")), Claim(text="d")),
        citations=(Citation(marker=1, chunk_id="x", document_id="d", title="t", quote="q"),),
        evidence=(Evidence(chunk_id="x", document_id="d", title="t", text="passage", score=0.5),),
    ),
    ChunkEmbedded(
        chunk_id="c",
        document_id="d",
        ordinal=3,
        title="t",
        text="x",
        tokens=1,
        model="m",
        model_version="1",
        vector=(0.5, -0.25, 1.0),
    ),
]


@pytest.fixture
def ids(apicurio: str) -> Iterator[RegistryIds]:
    made = RegistryIds(apicurio)
    yield made
    made.close()


@pytest.fixture
def stock(apicurio: str) -> Iterator[SchemaRegistryClient]:
    with SchemaRegistryClient({"url": apicurio}) as client:
        yield client


def produce(kafka: Kafka, topic: str, records: Sequence[Encoded]) -> None:
    producer = Producer(kafka.config)
    for value, headers in records:
        producer.produce(topic, value, key=b"t1", headers=headers)
    assert producer.flush(30) == 0


def consume(kafka: Kafka, topic: str, count: int) -> list[Any]:
    consumer = Consumer(
        {**kafka.config, "group.id": kafka.unique("g"), "auto.offset.reset": "earliest", "enable.auto.commit": False}
    )
    try:
        consumer.subscribe([topic])
        messages: list[Any] = []
        while len(messages) < count:
            fetched = consumer.consume(count - len(messages), 30)
            assert fetched, f"{len(messages)} of {count} records came"
            messages += fetched
        assert [message.error() for message in messages] == [None] * count
        return messages
    finally:
        consumer.close()


def serializer(client: SchemaRegistryClient, schema: str) -> AvroSerializer:
    return AvroSerializer(client, schema, conf={"subject.name.strategy": record_subject_name_strategy})


def test_a_stock_deserializer_reads_our_topic(kafka: Kafka, ids: RegistryIds, stock: SchemaRegistryClient) -> None:
    codec, topic = Codec(ids), kafka.topic("tasks")
    produce(kafka, topic, [codec.encode(event, META) for event in EVENTS])
    deserialize = AvroDeserializer(stock)
    for event, message in zip(EVENTS, consume(kafka, topic, len(EVENTS)), strict=True):
        values = deserialize(message.value(), SerializationContext(topic, MessageField.VALUE))
        assert type(event)(**values) == event
        assert set(values) == set(type(event).model_fields)
        envelope = codec.decode(Record.from_message(message))
        assert (envelope.event, envelope.metadata) == (event, META)


def test_we_read_what_a_stock_serializer_wrote(kafka: Kafka, ids: RegistryIds, stock: SchemaRegistryClient) -> None:
    topic = kafka.topic("tasks")
    context = SerializationContext(topic, MessageField.VALUE)
    values = [serializer(stock, avsc_text(type(event)))(event.model_dump(), context) or b"" for event in EVENTS]
    produce(kafka, topic, [Encoded(value, []) for value in values])
    codec = Codec(ids)
    for event, message in zip(EVENTS, consume(kafka, topic, len(EVENTS)), strict=True):
        envelope = codec.decode(Record.from_message(message))
        assert envelope.event == event
        metadata = envelope.metadata
        assert metadata.id == deterministic_id(topic, message.partition(), message.offset())
        assert (metadata.source, metadata.subject) == ("/clients/unknown", "t1")
        assert metadata.correlation_id == getattr(event, "task_id", getattr(event, "document_id", ""))
        assert round(metadata.time.timestamp() * 1000) == message.timestamp()[1]


OLD = {
    "type": "record",
    "name": "TaskSubmitted",
    "namespace": "magnatronic.tasks",
    "fields": [
        {"name": "urgency", "type": "int", "default": 0},
        {"name": "task_id", "type": "string"},
        {"name": "objective", "type": "string", "default": ""},
    ],
}


def test_old_versions_of_stock_clients_both_ways(kafka: Kafka, ids: RegistryIds, stock: SchemaRegistryClient) -> None:
    topic, codec = kafka.topic("tasks"), Codec(ids)
    context = SerializationContext(topic, MessageField.VALUE)
    old = serializer(stock, json.dumps(OLD))({"task_id": "t7", "objective": "old", "urgency": 3}, context)
    new = codec.encode(TaskSubmitted(task_id="t8", objective="new", parameters={"a": "b"}), META)
    assert old is not None
    produce(kafka, topic, [Encoded(old, []), new])
    written_old, written_new = consume(kafka, topic, 2)
    assert codec.decode(Record.from_message(written_old)).event == TaskSubmitted(task_id="t7", objective="old")
    read = AvroDeserializer(stock, json.dumps(OLD))(written_new.value(), context)
    assert read == {"urgency": 0, "task_id": "t8", "objective": "new"}


def test_the_manifests_records_are_read_by_their_header_whatever_the_id_means_here(ids: RegistryIds) -> None:
    """A topic that was written without a registry stays readable after one is set up."""
    event = EVENTS[0]
    encoded = Codec().encode(event, META)
    assert Codec(ids).decode(Record("t", 0, 0, 0, b"t1", encoded.value, encoded.headers)).event == event


# One contract for both sources of ids.


@pytest.fixture(params=["manifest", "registry"])
def source(request: pytest.FixtureRequest) -> SchemaIds:
    if request.param == "manifest":
        return ManifestIds()
    made: SchemaIds = request.getfixturevalue("ids")
    return made


def test_every_event_type_has_an_id_that_leads_back_to_its_schema(source: SchemaIds) -> None:
    schemas = [parsed_schema(model) for model in shipped_types().values()]
    found = [source.id_of(schema) for schema in schemas]
    assert len(set(found)) == len(found)
    assert all(0 < schema_id < 1 << 32 for schema_id in found)
    assert [source.schema_of(schema_id) for schema_id in found] == schemas
    assert [source.id_of(schema) for schema in schemas] == found


def test_an_unknown_id_is_nobodys(source: SchemaIds) -> None:
    assert source.schema_of((1 << 31) - 1) is None
    with pytest.raises(UnknownSchemaError):
        Codec(source).decode(Record("t", 0, 0, 0, None, b"\0\x7f\xff\xff\xff"))


def test_stock_records_are_read_by_their_framing_id(source: SchemaIds) -> None:
    codec = Codec(source)
    for event in EVENTS:
        assert codec.decode(Record("t", 0, 0, 0, b"k", codec.encode(event, META).value)).event == event


def test_ids_stay_when_the_source_is_opened_again(source: SchemaIds, apicurio: str) -> None:
    schema = parsed_schema(TaskSubmitted)
    again: SchemaIds = ManifestIds(Manifest.load()) if isinstance(source, ManifestIds) else RegistryIds(apicurio)
    assert again.id_of(schema) == source.id_of(schema)
    if isinstance(again, RegistryIds):
        again.close()


def test_an_incompatible_version_is_refused_by_the_registry(
    apicurio: str, ids: RegistryIds, stock: SchemaRegistryClient
) -> None:
    name = "magnatronic.examples.Refused"
    kinds = ("string", "long")
    first, second = (parse({"type": "record", "name": name, "fields": [{"name": "a", "type": kind}]}) for kind in kinds)
    assert isinstance(first, RecordType)
    assert isinstance(second, RecordType)
    ids.id_of(first)
    stock.set_compatibility(name, "FULL_TRANSITIVE")
    with pytest.raises(RegistryError, match="incompatible"):
        ids.id_of(second)


def test_a_registry_that_is_not_there() -> None:
    ids = RegistryIds("http://127.0.0.1:1/apis/ccompat/v7", timeout_s=1)
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:1.*MAGNATRONIC_SCHEMA_REGISTRY_URL") as caught:
        ids.id_of(parsed_schema(TaskSubmitted))
    assert caught.value.retryable
    ids.close()
