"""Data subjects' rights: topic ``privacy``, which every projection reads."""

from schemas.events.base import Event

__all__ = ["SubjectForgotten"]


class SubjectForgotten(Event, family="privacy"):
    """The key of a data subject was destroyed: what is about it is blank from now on, and projections delete it.

    ``key_id`` is the opaque id that events name it by; its name is not recorded. ``requested_by`` is who asked for it.
    """

    key_id: str
    requested_by: str
