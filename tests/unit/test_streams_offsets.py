import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.errors import OffsetMetadataError
from streams.offsets import METADATA_LIMIT, OffsetTracker, decode_finished, encode_finished


@given(base=st.integers(0, 2**40), places=st.sets(st.integers(1, 600)), length=st.integers(1, 700))
def test_what_is_encoded_is_decoded(base: int, places: set[int], length: int) -> None:
    unfinished = sorted({base, *(base + place for place in places if place < length)})
    until = base + length
    assert decode_finished(base, encode_finished(base, unfinished, until)) == (unfinished, until)


def test_the_shorter_coding_is_taken() -> None:
    sparse = encode_finished(0, [0, 500_000], 1_000_000)
    dense = encode_finished(0, range(0, 20_000, 2), 20_000)
    assert sparse[0] == "r"
    assert len(sparse) < 20
    assert dense[0] == "b"
    assert len(dense) < METADATA_LIMIT


@pytest.mark.parametrize("metadata", ["x", "r!", "rgICAgICAgICAgIA", "b/w", "r/////w8", "Ärger", "bAg"])
def test_foreign_metadata_is_refused(metadata: str) -> None:
    with pytest.raises(OffsetMetadataError, match="finished-offset map"):
        OffsetTracker(7, metadata)


def test_nothing_begun_means_nothing_to_commit() -> None:
    assert OffsetTracker().checkpoint(()) is None
    known = OffsetTracker(5).checkpoint(())
    assert known is not None
    assert (known.offset, known.metadata) == (5, "")


def test_an_offset_is_begun_once() -> None:
    tracker = OffsetTracker(3)
    assert tracker.begin(3)
    assert not tracker.begin(3)
    assert tracker.begin(9)
    assert not tracker.begin(5)


def test_a_slow_event_holds_nobody_back() -> None:
    tracker = OffsetTracker(0)
    for offset in range(10):
        assert tracker.begin(offset)
    checkpoint = tracker.checkpoint([offset for offset in range(10) if offset != 4])
    assert checkpoint is not None
    assert checkpoint.offset == 4
    heir = OffsetTracker(checkpoint.offset, checkpoint.metadata)
    assert [offset for offset in range(4, 13) if heir.begin(offset)] == [4, 10, 11, 12]


def test_unfinished_offsets_whose_records_are_gone_do_not_block() -> None:
    first = OffsetTracker(0)
    for offset in range(6):
        first.begin(offset)
    kept = first.checkpoint([1, 5])
    assert kept is not None
    heir = OffsetTracker(kept.offset, kept.metadata)
    # Retention took 0 to 3; 4 is still there.
    assert heir.begin(4)
    done = heir.checkpoint([4])
    assert done is not None
    assert (done.offset, done.metadata) == (6, "")
    other = OffsetTracker(kept.offset, kept.metadata)
    assert other.begin(8)
    done = other.checkpoint([8])
    assert done is not None
    assert (done.offset, done.metadata) == (9, "")


@settings(max_examples=150, deadline=None)
@given(data=st.data(), limit=st.sampled_from([24, 40, 200, METADATA_LIMIT]))
def test_through_any_history_each_offset_is_done_once(data: st.DataObject, limit: int) -> None:
    """Fetch, finish in any order, commit, hand over to a new owner: no offset is lost, none committed twice, and no
    metadata is over the limit."""
    log = sorted(data.draw(st.sets(st.integers(0, 400), min_size=1, max_size=120)))  # gaps are transaction markers
    done: set[int] = set()
    committed: tuple[int | None, str] = (None, "")
    position = 0
    tracker = OffsetTracker(limit=limit)
    running: list[int] = []
    waiting: list[int] = []

    def commit() -> None:
        nonlocal committed, waiting
        checkpoint = tracker.checkpoint(waiting)
        if checkpoint is None:
            return
        assert len(checkpoint.metadata) <= limit
        taken = [offset for offset in waiting if checkpoint.cutoff is None or offset < checkpoint.cutoff]
        waiting = [offset for offset in waiting if offset not in taken]
        assert not done & set(taken)
        done.update(taken)
        committed = checkpoint.offset, checkpoint.metadata
        assert all(offset in done for offset in log if offset < checkpoint.offset)

    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["fetch", "finish", "commit", "move"]))
        if action == "fetch":
            for offset in log[position : position + data.draw(st.integers(1, 40))]:
                position += 1
                if tracker.begin(offset):
                    assert offset not in done
                    running.append(offset)
        elif action == "finish" and running:
            waiting += data.draw(st.lists(st.sampled_from(running), min_size=1, unique=True))
            running = [offset for offset in running if offset not in waiting]
        elif action == "commit":
            commit()
        elif action == "move":
            running.clear()
            waiting.clear()
            tracker = OffsetTracker(*committed, limit=limit)
            start = committed[0] or 0
            position = sum(1 for offset in log if offset < start)

    # In the end all is fetched, finished and committed.
    waiting += running
    waiting += [offset for offset in log[position:] if tracker.begin(offset)]
    before = -1
    while waiting and len(waiting) != before:
        before = len(waiting)
        commit()
    assert done == set(log)
