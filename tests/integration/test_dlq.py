"""Dead letters on a real Kafka: found, read whole, sent again once and only once."""

import random
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition

from magnatronic.dlq import TRANSACTIONAL_ID, DeadLetters
from magnatronic.errors import ClusterError, FencedOperatorError, WrongInputError
from magnatronic.letters import DEAD_LETTERS, Entry, Filter, LetterReader, Place
from schemas.codec import Codec
from schemas.events import DeadLettered
from schemas.metadata import Metadata, deterministic_id
from schemas.record import Header, Record
from schemas.topics import topic_of
from streams.kafka import reader_settings

CODEC = Codec()
HEADERS: list[Header] = [("ce_id", b"1"), ("x", b"\xff"), ("x", b"again")]


class Letters:
    """One agent's dead letters of one source topic."""

    def __init__(self, kafka: Any) -> None:
        self.kafka = kafka
        self.agent = kafka.unique("agent")
        self.topic = kafka.topic("source", partitions=2)
        self.reader = LetterReader(kafka.config, CODEC)
        self.producer = Producer({**kafka.config, "enable.idempotence": True, "message.max.bytes": 8_000_000})

    def letter(self, offset: int, value: bytes | None = b"poison", **changes: Any) -> DeadLettered:
        fields: dict[str, Any] = {
            "source_topic": self.topic,
            "source_partition": 1,
            "source_offset": offset,
            "source_timestamp": datetime(2026, 1, 1, tzinfo=UTC),
            "key": b"k",
            "value": value,
            "header_names": tuple(name for name, _ in HEADERS),
            "header_values": tuple(content for _, content in HEADERS),
            "agent": self.agent,
            "error_type": "RuntimeError",
            "error": "told to fail",
            "attempts": 3,
        }
        return DeadLettered(**{**fields, **changes})

    def write(self, letter: DeadLettered, producer: Producer | None = None) -> None:
        place = letter.source_topic, letter.source_partition, letter.source_offset
        metadata = Metadata(
            id=deterministic_id(*place, letter.agent, "dead-letter"),
            source=f"/agents/{letter.agent}@1",
            subject=letter.source_topic,
            time=datetime.now(UTC),
            correlation_id="t",
        )
        value, headers = CODEC.encode(letter, metadata)
        (producer or self.producer).produce(DEAD_LETTERS, value, letter.source_topic.encode(), headers=headers)

    def flush(self) -> None:
        assert self.producer.flush(20) == 0

    def entries(self) -> list[Entry]:
        return list(filter(Filter(agent=self.agent), self.reader.entries()))

    def operator(self, name: str = "tester") -> DeadLetters:
        return DeadLetters(self.kafka.config, CODEC, by=name)

    def sent(self) -> list[Record]:
        """What lies in the source topic."""
        consumer = Consumer(reader_settings(self.kafka.config, f"test-{uuid4()}"))
        found, waiting = [], {0, 1}
        try:
            consumer.assign([TopicPartition(self.topic, number, 0) for number in waiting])
            while waiting:
                for message in consumer.consume(1000, 0.3):
                    if message.error() is None:
                        found.append(Record.from_message(message))
                    else:
                        assert message.error().code() == KafkaError._PARTITION_EOF
                        waiting.discard(message.partition())
        finally:
            consumer.close()
        return found


@pytest.fixture
def letters(kafka: Any) -> Iterator[Letters]:
    if DEAD_LETTERS not in kafka.admin.list_topics(timeout=20).topics:
        kafka.create_topics(DEAD_LETTERS, 1, {"max.message.bytes": str(topic_of(DeadLettered).max_message_bytes)})
    letters = Letters(kafka)
    yield letters
    letters.flush()


def test_a_redriven_letter_is_its_record_for_its_agent_and_is_open_no_more(letters: Letters) -> None:
    for offset in (4, 9):
        letters.write(letters.letter(offset))
    letters.flush()
    before = letters.entries()
    assert [entry.place for entry in before] == [Place(letters.topic, 1, offset, letters.agent) for offset in (4, 9)]
    assert all(entry.resolved is None and entry.attempts == 3 and entry.kept for entry in before)

    (resolved,) = letters.operator("ada").redrive(before[1:], reason="mended")
    (record,) = letters.sent()
    assert (record.partition, record.offset) == (resolved.partition, resolved.offset) == (1, 0)
    assert (record.key, record.value) == (b"k", b"poison")
    assert list(record.headers) == [*HEADERS, ("redrive", letters.agent.encode())]

    first, second = letters.entries()
    assert first.resolved is None
    assert second.resolved is not None
    assert (second.resolved.resolution.value, second.resolved.resolved_by) == ("redriven", "ada")
    assert second.resolved.reason == "mended"
    with pytest.raises(WrongInputError, match=f"{second.short_id} was redriven by ada already"):
        letters.operator().redrive([first, second])
    with pytest.raises(WrongInputError, match="already"):
        letters.operator().discard([second], reason="no use")
    assert len(letters.sent()) == 1

    assert letters.operator().redrive([second], skip_resolved=True) == []
    letters.operator().redrive([second, second], again=True)
    assert len(letters.sent()) == 2
    assert letters.entries()[1].resolutions == 2


def test_a_letter_written_again_is_open_again(letters: Letters) -> None:
    letters.write(letters.letter(1))
    letters.flush()
    letters.operator().redrive(letters.entries())
    letters.write(letters.letter(1, attempts=5))
    letters.flush()
    (entry,) = letters.entries()
    assert (entry.resolved, entry.attempts, entry.resolutions) == (None, 5, 1)
    letters.operator().redrive([entry])
    assert len(letters.sent()) == 2


def test_a_discarded_letter_leaves_the_source_alone(letters: Letters) -> None:
    letters.write(letters.letter(1))
    letters.flush()
    with pytest.raises(WrongInputError, match="say why"):
        letters.operator().discard(letters.entries(), reason=" ")
    letters.operator("bob").discard(letters.entries(), reason="of no worth")
    (entry,) = letters.entries()
    assert entry.resolved is not None
    assert (entry.resolved.resolution.value, entry.resolved.reason) == ("discarded", "of no worth")
    assert letters.sent() == []
    assert letters.operator().redrive([entry], again=True)[0].offset == 0


def bare(letters: Letters, offset: int, **changes: Any) -> DeadLettered:
    """A letter that had no room for its record, or had the record taken out."""
    return letters.letter(offset, **{"value": None, "header_names": (), "header_values": (), **changes})


@pytest.mark.parametrize("value", [None, b""])
def test_a_record_that_its_letter_has_no_room_for_comes_from_its_topic(letters: Letters, value: bytes | None) -> None:
    for number in range(3):
        letters.producer.produce(letters.topic, f"large {number}".encode(), b"k", 1, headers=HEADERS)
    letters.write(bare(letters, 1, value=value))
    letters.flush()
    (entry,) = letters.entries()
    assert not entry.kept
    whole = letters.reader.whole(entry)
    assert whole.record is not None
    assert (whole.record.offset, whole.record.value) == (1, b"large 1")
    letters.operator().redrive([entry])
    *_, again = letters.sent()
    assert (again.offset, again.value) == (3, b"large 1")
    assert list(again.headers) == [*HEADERS, ("redrive", letters.agent.encode())]


def test_nothing_is_sent_where_one_record_is_gone(letters: Letters) -> None:
    for number in range(3):
        letters.producer.produce(letters.topic, f"large {number}".encode(), b"k", 1)
    letters.write(letters.letter(0))
    letters.write(bare(letters, 1))
    letters.flush()
    place = TopicPartition(letters.topic, 1, 2)
    letters.kafka.admin.delete_records([place])[place].result(20)
    kept, gone = letters.entries()
    assert letters.reader.whole(gone).record is None
    with pytest.raises(WrongInputError, match=rf"{gone.short_id} was too large .* nothing was redriven"):
        letters.operator().redrive([kept, gone])
    assert [record.value for record in letters.sent()] == [b"large 2"]
    assert all(entry.resolved is None for entry in letters.entries())
    letters.operator().discard([gone], reason="gone")


def test_a_letter_of_a_topic_that_is_gone_says_so(letters: Letters) -> None:
    letters.write(letters.letter(0, source_topic="no-such-topic"))
    letters.flush()
    with pytest.raises(WrongInputError, match=r"no-such-topic\[1\], which the cluster no longer has"):
        letters.operator().redrive(letters.entries())


def test_a_record_that_its_topic_refuses_changes_nothing(letters: Letters) -> None:
    letters.topic = letters.kafka.topic("small", partitions=2, config={"max.message.bytes": "1000"})
    letters.write(letters.letter(0))
    letters.write(letters.letter(1, value=random.Random(1).randbytes(5000)))  # that no compression makes small enough
    letters.flush()
    with pytest.raises(ClusterError, match=rf"{letters.topic}.*0 of 2 letters were redriven"):
        letters.operator().redrive(letters.entries())
    assert letters.sent() == []
    assert all(entry.resolved is None for entry in letters.entries())


def test_hundreds_go_in_transactions_of_some_hundred(letters: Letters) -> None:
    for offset in range(1200):
        letters.write(letters.letter(offset, value=str(offset).encode()))
    letters.flush()
    entries = letters.entries()
    done = letters.operator().redrive(entries)
    assert [each.entry.place for each in done] == [entry.place for entry in entries]
    sent = {(record.partition, record.offset): record.value for record in letters.sent()}
    assert [sent[each.partition or 0, each.offset or 0] for each in done] == [str(n).encode() for n in range(1200)]
    assert all(entry.resolved is not None for entry in letters.entries())


def test_of_two_operators_at_once_one_sends(letters: Letters, monkeypatch: pytest.MonkeyPatch) -> None:
    letters.write(letters.letter(3))
    letters.flush()
    (entry,) = letters.entries()
    slow = letters.operator("slow")
    read = slow._reader.entries

    def overtaken() -> Sequence[Entry]:
        """The slow one has seen that the letter is open; then comes the other."""
        seen = read()
        letters.operator("quick").redrive([entry])
        return seen

    monkeypatch.setattr(slow._reader, "entries", overtaken)
    with pytest.raises(FencedOperatorError, match=r"another operator began .* 0 of 1 were redriven here"):
        slow.redrive([entry])
    assert len(letters.sent()) == 1
    (now,) = letters.entries()
    assert now.resolved is not None
    assert (now.resolved.resolved_by, now.resolutions) == ("quick", 1)


def test_what_a_crashed_operator_left_open_counts_for_nothing(letters: Letters) -> None:
    letters.write(letters.letter(3))
    letters.flush()
    crashed = Producer({**letters.kafka.config, "transactional.id": TRANSACTIONAL_ID})
    crashed.init_transactions(20)
    crashed.begin_transaction()
    crashed.produce(letters.topic, b"half", b"k", 1)
    assert crashed.flush(20) == 0
    letters.operator().redrive(letters.entries())
    assert [record.value for record in letters.sent()] == [b"poison"]


def test_what_was_committed_behind_an_open_transaction_is_seen(letters: Letters) -> None:
    letters.write(letters.letter(1))
    letters.flush()
    (entry,) = letters.entries()
    processor = Producer({**letters.kafka.config, "transactional.id": letters.kafka.unique("processor")})
    processor.init_transactions(20)
    processor.begin_transaction()
    letters.write(letters.letter(2), processor)
    assert processor.flush(20) == 0
    # The transaction is open, and what is behind it in the topic can't be read yet.
    ending = threading.Timer(1.5, processor.commit_transaction, (20,))
    ending.start()
    letters.operator().discard([entry], reason="of no worth")
    ending.join()
    assert [each.resolved is not None for each in letters.entries()] == [True, False]
