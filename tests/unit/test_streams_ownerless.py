"""What a member's assignment holds, as brokers hand it out."""

import struct

import pytest

from streams.ownerless import places_of


def assignment(version: int, topics: dict[str, list[int]], user_data: bytes | None = None) -> bytes:
    """ConsumerProtocolAssignment, as the protocol's definition has it."""
    parts = [struct.pack(">hi", version, len(topics))]
    for topic, numbers in topics.items():
        name = topic.encode()
        parts.append(struct.pack(f">h{len(name)}si{len(numbers)}i", len(name), name, len(numbers), *numbers))
    parts.append(struct.pack(">i", -1) if user_data is None else struct.pack(">i", len(user_data)) + user_data)
    return b"".join(parts)


@pytest.mark.parametrize("version", [0, 3])
@pytest.mark.parametrize("topics", [{}, {"a": []}, {"tasks.high": [0, 3], "tasks.näher": [70_000]}])
@pytest.mark.parametrize("user_data", [None, b"", b"sticky"])
def test_each_partition_of_an_assignment_is_found(
    version: int, topics: dict[str, list[int]], user_data: bytes | None
) -> None:
    found = places_of(assignment(version, topics, user_data))
    assert found == [(topic, number) for topic, numbers in topics.items() for number in numbers]


def test_a_member_without_an_assignment_has_nothing() -> None:
    assert places_of(b"") == []
