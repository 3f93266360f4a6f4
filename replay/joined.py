"""An archive and the log after it, read as one log: history that outlives the topics' retention.

In: an :class:`~replay.archive.ArchiveLog` and the log that it was made of. Out: a :class:`~replay.log.Log` that gives
what the log holds, and before that, where no gap lies between, what the archive holds.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from replay.archive import ArchiveLog
from replay.log import ALL, Batch, Log, Progress, wanted_spans
from replay.selection import Place, Selection, Span

__all__ = ["JoinedLog"]


class JoinedLog(Log):
    """``archive``, then ``log``. Both stay their owner's to close."""

    def __init__(self, archive: ArchiveLog, log: Log) -> None:
        self._archive = archive
        self._log = log

    def close(self) -> None:
        """Nothing is held open here."""

    def spans(self, topics: Collection[str] = ()) -> dict[Place, Span]:
        """See :meth:`replay.log.Log.spans`. Of the archive only that counts which reaches without a gap to where the
        log begins.
        """
        spans = self._log.spans(topics)
        archived = self._archive.spans()
        for gap in self._archive.gaps:
            place = gap.topic, gap.partition
            first, last = archived[place]
            archived[place] = max(first, gap.end), last
        for place, (begin, end) in spans.items():
            first, last = archived.get(place, (begin, begin))
            if first < begin <= last:
                spans[place] = first, end
        return spans

    def read(
        self,
        selection: Selection = ALL,
        *,
        start: Mapping[Place, int] | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Batch]:
        """See :meth:`replay.log.Log.read`: the archive's part, then the log's."""
        topics = selection.topics
        if selection.spans is not None:
            named = {topic for topic, _ in selection.spans}
            topics = frozenset(named & topics) if topics else frozenset(named)
            if not topics:
                return
        wanted = wanted_spans(self.spans(topics), selection, start or {}, "the archive does not reach back to that")
        begins = {place: first for place, (first, _) in self._log.spans({topic for topic, _ in wanted}).items()}
        older = {place: (first, max(first, min(end, begins[place]))) for place, (first, end) in wanted.items()}
        newer = {place: (max(first, min(end, begins[place])), end) for place, (first, end) in wanted.items()}
        positions = {place: first for place, (first, _) in wanted.items()}
        begun = sum(positions.values())
        total = sum(end for _, end in wanted.values()) - begun
        for log, part in ((self._archive, older), (self._log, newer)):
            meant = {place: span for place, span in part.items() if span[0] < span[1]}
            if not meant:
                continue
            for batch in log.read(replace(selection, topics=frozenset(), spans=meant)):
                positions |= batch.positions
                yield Batch(batch.records, dict(positions))
                if on_progress is not None:
                    on_progress(sum(positions.values()) - begun, total)
        if not total:
            yield Batch((), dict(positions))
