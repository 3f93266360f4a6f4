"""Which records a selection takes, what counts as finished, and how a command line says both."""

import io
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar

import click
import pytest
from rich.console import Console

from magnatronic.cli.history import HistoryOptions, history_options
from magnatronic.cli.options import Output
from magnatronic.cli.progress import show_reading
from magnatronic.errors import WrongInputError
from replay.errors import LogReadError, LogTruncatedError
from replay.finished import Finished
from replay.log import wanted_spans
from replay.selection import Selection, milliseconds
from schemas.record import Record

AT = datetime(2026, 1, 2, 3, 4, 5, 678_900, tzinfo=UTC)


def record(**fields: Any) -> Record:
    made: dict[str, Any] = {
        "topic": "tasks.normal",
        "partition": 0,
        "offset": 5,
        "timestamp_ms": 1000,
        "key": b"t1",
        "value": b"",
        "headers": [
            ("ce_id", b"1"),
            ("ce_source", b"/agents/overseer@3"),
            ("ce_type", b"magnatronic.tasks.TaskSubmitted"),
        ],
    }
    return Record(**{**made, **fields})


class TestSelection:
    def test_takes_all_by_itself(self) -> None:
        assert Selection().takes(record())
        assert Selection().filter() is None

    @pytest.mark.parametrize(
        ("selection", "taken"),
        [
            (Selection(topics=frozenset({"tasks.normal"})), True),
            (Selection(topics=frozenset({"tasks.high"})), False),
            (Selection(spans={("tasks.normal", 0): (5, 6)}), True),
            (Selection(spans={("tasks.normal", 0): (4, 5)}), False),
            (Selection(spans={("tasks.normal", 1): (0, 9)}), False),
            (Selection(since=datetime.fromtimestamp(1, UTC)), True),
            (Selection(since=datetime.fromtimestamp(1.0001, UTC)), False),
            (Selection(until=datetime.fromtimestamp(1, UTC)), False),
            (Selection(until=datetime.fromtimestamp(1.0001, UTC)), True),
            (Selection(tasks=frozenset({"t1", "t2"})), True),
            (Selection(tasks=frozenset({"t"})), False),
            (Selection(agents=frozenset({"overseer"})), True),
            (Selection(agents=frozenset({"over"})), False),
            (Selection(agents=frozenset({"overseer@3"})), False),
            (Selection(event_types=frozenset({"TaskSubmitted"})), True),
            (Selection(event_types=frozenset({"magnatronic.tasks.TaskSubmitted"})), True),
            (Selection(event_types=frozenset({"TaskCompleted"})), False),
            (Selection(correlation_ids=frozenset({"t1"})), False),  # it has an id, so it would say so
        ],
    )
    def test_takes_by_one_thing(self, selection: Selection, taken: bool) -> None:
        assert selection.takes(record()) is taken

    def test_of_records_of_stock_producers_the_topic_and_the_key_tell(self) -> None:
        plain = record(headers=())
        assert Selection(event_types=frozenset({"TaskSubmitted"})).takes(plain)
        assert not Selection(event_types=frozenset({"TaskCompleted"})).takes(plain)
        assert Selection(correlation_ids=frozenset({"t1"})).takes(plain)
        assert not Selection(agents=frozenset({"overseer"})).takes(plain)

    def test_all_conditions_must_hold(self) -> None:
        both = Selection(tasks=frozenset({"t1"}), agents=frozenset({"overseer"}), since=datetime.fromtimestamp(0, UTC))
        assert both.takes(record())
        assert not both.takes(record(key=b"t2"))
        assert not both.takes(record(headers=[("ce_source", b"/clients/overseer@3")]))

    def test_a_time_without_zone_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no time zone"):
            Selection(since=AT.replace(tzinfo=None))

    def test_milliseconds_are_rounded_up(self) -> None:
        assert milliseconds(AT) == int(AT.timestamp() * 1000) + 1
        exact = AT.replace(microsecond=678_000)
        assert milliseconds(exact) == round(exact.timestamp() * 1000)
        assert milliseconds(exact.astimezone(timezone(timedelta(hours=5)))) == milliseconds(exact)


class TestWantedSpans:
    HELD: ClassVar = {("a", 0): (10, 20), ("a", 1): (0, 0)}

    def wanted(self, selection: Selection, start: dict[tuple[str, int], int]) -> dict[tuple[str, int], tuple[int, int]]:
        return wanted_spans(self.HELD, selection, start, "why")

    def test_all_that_is_held(self) -> None:
        assert self.wanted(Selection(), {}) == self.HELD
        assert self.wanted(Selection(), {("a", 0): 15}) == {("a", 0): (15, 20), ("a", 1): (0, 0)}

    @pytest.mark.parametrize(
        ("span", "start", "expected"),
        [((12, 15), 0, (12, 15)), ((12, 15), 14, (14, 15)), ((12, 15), 17, (15, 15)), ((12, 99), 0, (12, 20))],
    )
    def test_a_span(self, span: tuple[int, int], start: int, expected: tuple[int, int]) -> None:
        assert self.wanted(Selection(spans={("a", 0): span}), {("a", 0): start}) == {("a", 0): expected}

    def test_what_is_not_held(self) -> None:
        for selection, start in ((Selection(spans={("a", 0): (9, 12)}), {}), (Selection(), {("a", 0): 9})):
            with pytest.raises(LogTruncatedError, match="a/0 begins at offset 10, and 9 is asked for: why"):
                self.wanted(selection, start)
        for selection, start in ((Selection(spans={("a", 0): (21, 22)}), {}), (Selection(), {("a", 0): 21})):
            with pytest.raises(LogReadError, match="ends at offset 20, and 21"):
                self.wanted(selection, start)


class TestFinished:
    def test_all_before_until_but_what_is_open(self) -> None:
        made = Finished.committed({("a", 0): ([3, 4, 7], 9), ("a", 1): ([], 0)})
        assert [offset for offset in range(12) if made.finished("a", 0, offset)] == [0, 1, 2, 5, 6, 8]
        assert not made.finished("a", 1, 0)
        assert not made.finished("b", 0, 0)

    def test_survives_json(self) -> None:
        made = Finished.committed({("a", 0): ([3, 4, 7], 9), ("b", 2): ([], 5)})
        assert made.as_json() == [["a", 0, 9, [[3, 5], [7, 8]]], ["b", 2, 5, []]]
        assert Finished.from_json(made.as_json()).as_json() == made.as_json()


def parsed(*arguments: str) -> HistoryOptions:
    got: list[HistoryOptions] = []

    @click.command()
    @history_options
    def command(*, history: HistoryOptions) -> None:
        got.append(history)

    command.main(list(arguments), standalone_mode=False)
    return got[0]


class TestOptions:
    def test_all_of_them(self) -> None:
        told = parsed(
            *("--from", "/a", "--since", "2026-01-01T00:00:00Z", "--until", "2026-01-02T00:00:00Z", "--topic", "work"),
            *("--offsets", "effects/0:1-4", "--offsets", "effects/1:2-3", "--task", "t", "--agent", "overseer"),
            *("--type", "StepFailed", "--correlation", "c"),
        )
        assert told.archive == Path("/a")
        assert told.selection == Selection(
            topics=frozenset(
                {f"work.{kind}.{priority}" for kind in ("retrieve", "research") for priority in PRIORITIES}
            ),
            since=datetime(2026, 1, 1, tzinfo=UTC),
            until=datetime(2026, 1, 2, tzinfo=UTC),
            spans={("effects", 0): (1, 4), ("effects", 1): (2, 3)},
            tasks=frozenset({"t"}),
            agents=frozenset({"overseer"}),
            event_types=frozenset({"StepFailed"}),
            correlation_ids=frozenset({"c"}),
        )

    def test_none_of_them(self) -> None:
        assert parsed() == HistoryOptions(None, Selection())

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--topic", "nope"), "there is no topic 'nope'; there are: .*tasks.high"),
            (("--type", "Nope"), "there is no event type 'Nope'; there are: .*StepFailed"),
            (("--offsets", "effects:1-2"), "write TOPIC/PARTITION:FROM-TO"),
            (("--offsets", "effects/0:2-2"), "write TOPIC/PARTITION:FROM-TO"),
            (("--offsets", "effects/0:1-2", "--offsets", "effects/0:4-5"), "names effects/0 twice"),
            (("--since", "1h", "--until", "2h"), "is not before --until"),
        ],
    )
    def test_wrong_ones(self, arguments: tuple[str, ...], said: str) -> None:
        with pytest.raises(WrongInputError, match=said):
            parsed(*arguments)


PRIORITIES = ("high", "normal", "low")


class TestProgress:
    def bar(self, *, as_json: bool = False, terminal: bool = True) -> str:
        out = Output(as_json)
        file = io.StringIO()
        out.__dict__["progress"] = Console(file=file, force_terminal=terminal, width=100, quiet=as_json)
        with show_reading(out, "reading") as progress:
            progress(50, 100)
            progress(100, 100)
        return file.getvalue()

    def test_shows_how_far_it_is_where_somebody_watches(self) -> None:
        assert "reading" in self.bar()
        assert "100/100" in self.bar()

    def test_is_silent_for_programs_and_where_nobody_watches(self) -> None:
        assert self.bar(as_json=True) == self.bar(terminal=False) == ""
