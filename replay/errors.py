"""The errors of replay.

ReplayError
├── LogReadError            the log could not be read
│   ├── LogTruncatedError   it no longer holds what was asked for
│   └── ArchiveError        there is no archive, or it is another one's
│       ├── ArchiveDamagedError  a file or a line of the manifest was changed, or is missing
│       ├── ArchiveGapError      retention deleted what was to be archived
│       └── ArchiveBusyError     another process writes it
├── PinnedFileError         a golden history's file can't be read, is none, or may not be written
├── ReportError             a file is no audit report, or one of another release
├── UnknownIdError          no record is about what was asked for
│   └── UnknownTaskError    no record carries the task's id
├── WhatIfError             a what-if can't be run, or not gone on with
│   └── UndecidedError      other code can't decide a step of a task
└── OpenTaskError           the task has no outcome yet, so its history is not complete
"""

__all__ = [
    "ArchiveBusyError",
    "ArchiveDamagedError",
    "ArchiveError",
    "ArchiveGapError",
    "LogReadError",
    "LogTruncatedError",
    "OpenTaskError",
    "PinnedFileError",
    "ReplayError",
    "ReportError",
    "UndecidedError",
    "UnknownIdError",
    "UnknownTaskError",
    "WhatIfError",
]


class ReplayError(Exception):
    """The base of all errors of replay."""


class LogReadError(ReplayError):
    """The log could not be read: the cluster can't be reached, or a topic is missing."""


class LogTruncatedError(LogReadError):
    """The log's beginning has moved past what was asked for: the topic's retention has deleted it."""


class ArchiveError(LogReadError):
    """There is no archive in the folder, or it is of another system or release."""


class ArchiveDamagedError(ArchiveError):
    """A file of an archive, or a line of its manifest, was changed or is missing."""


class ArchiveGapError(ArchiveError):
    """Retention deleted records before they were archived."""


class ArchiveBusyError(ArchiveError):
    """Another process writes this archive."""


class PinnedFileError(ReplayError):
    """The file of a golden history is wrong, or in the way."""


class UnknownIdError(ReplayError):
    """No record in the log is about what was asked for."""


class UnknownTaskError(UnknownIdError):
    """No record in the log carries the task's id."""


class OpenTaskError(ReplayError):
    """The task has no outcome yet."""


class WhatIfError(ReplayError):
    """The what-if can't be run as it was asked for, or its folder can't be used."""


class UndecidedError(WhatIfError):
    """The code of another revision can't decide a step, or decides what can't be read here."""


class ReportError(ReplayError):
    """A file is no audit report, or one that this release can't read."""
