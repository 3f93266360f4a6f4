"""Archives of the log: Parquet files with a chain of hashes, so that history outlives the topics' retention."""

from replay.archive.archive_log import ArchiveLog
from replay.archive.archiver import Archived, Archiver
from replay.archive.manifest import Gap, Header, Manifest, Segment, Stretch
from replay.archive.rows import LeftSealed
from replay.archive.segment import Limits
from replay.archive.verify import Verified, verify

__all__ = [
    "ArchiveLog",
    "Archived",
    "Archiver",
    "Gap",
    "Header",
    "LeftSealed",
    "Limits",
    "Manifest",
    "Segment",
    "Stretch",
    "Verified",
    "verify",
]
