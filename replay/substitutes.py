"""What stands in for clocks and random numbers while a guard is installed.

In: ``noted(kind, what)``, which notes a use and gives the guard when a watched handler's code made it, else None. Out:
replacements, each with the object and the name that it replaces. Whoever is not watched gets the real thing; the second
run of a step gets a later time and other numbers.
"""

import _thread
import datetime as real_datetime
import importlib
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Final, Protocol

from agents.errors import NondeterminismError
from replay.findings import FindingKind

__all__ = ["Noted", "Substitute", "Watching", "classes", "functions"]

_SHIFT: Final = real_datetime.timedelta(days=400, hours=5, minutes=43, seconds=21, microseconds=123_457)
"""How much later it is in the second run: no field of a date or time stays the same."""
_SHIFT_S: Final = _SHIFT.total_seconds()
_SHIFT_NS: Final = int(_SHIFT_S * 1_000_000) * 1000
_SECONDS: Final = ("time", "monotonic", "perf_counter", "process_time", "thread_time")
_CLOCK: Final = FindingKind.CLOCK


class Watching(Protocol):
    """The guard, as far as substitutes need it."""

    second: bool

    @property
    def random(self) -> random.Random:
        """Random numbers for the handler's run."""


Noted = Callable[[FindingKind, str], Watching | None]
Substitute = tuple[Any, str, Any]
"""An object, the name of its attribute, and what is to stand there."""


def functions(noted: Noted) -> Iterator[Substitute]:
    """Replacements of functions; whoever bound one under a name of their own is to be given its substitute too."""
    yield from _clocks(noted)
    yield from _blocked(noted)
    yield from _randoms(noted)
    yield from _numpy_randoms(noted)


def _clocks(noted: Noted) -> Iterator[Substitute]:
    for name in _SECONDS:
        yield time, name, _clock(noted, name, getattr(time, name), _SHIFT_S)
        yield time, f"{name}_ns", _clock(noted, f"{name}_ns", getattr(time, f"{name}_ns"), _SHIFT_NS)
    yield time, "clock_gettime", _clock(noted, "clock_gettime", time.clock_gettime, _SHIFT_S)
    yield time, "clock_gettime_ns", _clock(noted, "clock_gettime_ns", time.clock_gettime_ns, _SHIFT_NS)
    for name, place in (("localtime", 0), ("gmtime", 0), ("ctime", 0), ("asctime", 0), ("strftime", 1)):
        yield time, name, _calendar(noted, name, getattr(time, name), place)


def _blocked(noted: Noted) -> Iterator[Substitute]:
    """What has no audit event in this Python, and is not to happen."""
    for module, name, kind in (
        (time, "sleep", _CLOCK),
        (_thread, "start_new_thread", FindingKind.THREAD),
        (_thread, "start_new", FindingKind.THREAD),
        (threading, "_start_new_thread", FindingKind.THREAD),
    ):
        yield module, name, _block(noted, kind, f"{module.__name__}.{name}", getattr(module, name))


def _block(noted: Noted, kind: FindingKind, what: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def blocked(*args: Any, **named: Any) -> Any:
        if noted(kind, what) is not None:
            raise NondeterminismError(f"{what}: a handler waits only for what ctx or its own tasks give it")
        return original(*args, **named)

    return blocked


def _clock(noted: Noted, name: str, original: Callable[..., Any], shift: float) -> Callable[..., Any]:
    what = f"time.{name}"

    def read(*args: Any) -> Any:
        guard = noted(_CLOCK, what)
        value = original(*args)
        return value + shift if guard is not None and guard.second else value

    return read


def _calendar(noted: Noted, name: str, original: Callable[..., Any], place: int) -> Callable[..., Any]:
    """For functions that take the time at ``place``, or that of now."""
    what, now = f"time.{name}", time.time
    localtime = time.localtime

    def read(*args: Any) -> Any:
        if len(args) > place and args[place] is not None:
            return original(*args)
        guard = noted(_CLOCK, what)
        if guard is None or not guard.second:
            return original(*args)
        at = now() + _SHIFT_S
        return original(*args[:place], localtime(at) if name in ("asctime", "strftime") else at)

    return read


class _LikeReal(type):
    """Guarded classes are the real ones to isinstance and issubclass."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.__base__)  # type: ignore[arg-type]

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.__base__)  # type: ignore[arg-type]


def classes(noted: Noted) -> dict[int, Any]:
    """What is to stand for the classes ``datetime`` and ``date``, and for their module, by the id of the real one."""

    def later(guard: Watching | None) -> real_datetime.timedelta:
        return _SHIFT if guard is not None and guard.second else real_datetime.timedelta()

    class GuardedDatetime(real_datetime.datetime, metaclass=_LikeReal):
        def __new__(cls, *args: Any, **named: Any) -> Any:
            return real_datetime.datetime(*args, **named)

        @classmethod
        def now(cls, tz: real_datetime.tzinfo | None = None) -> Any:
            return real_datetime.datetime.now(tz) + later(noted(_CLOCK, "datetime.now"))

        @classmethod
        def utcnow(cls) -> Any:
            return real_datetime.datetime.utcnow() + later(noted(_CLOCK, "datetime.utcnow"))

        @classmethod
        def today(cls) -> Any:
            return real_datetime.datetime.today() + later(noted(_CLOCK, "datetime.today"))

    class GuardedDate(real_datetime.date, metaclass=_LikeReal):
        def __new__(cls, *args: Any, **named: Any) -> Any:
            return real_datetime.date(*args, **named)

        @classmethod
        def today(cls) -> Any:
            return real_datetime.date.today() + later(noted(_CLOCK, "date.today"))

    module = ModuleType("datetime")
    module.__dict__.update(vars(real_datetime), datetime=GuardedDatetime, date=GuardedDate)
    return {
        id(real_datetime.datetime): GuardedDatetime,
        id(real_datetime.date): GuardedDate,
        id(real_datetime): module,
    }


def _randoms(noted: Noted) -> Iterator[Substitute]:
    for name in random.__all__:
        if getattr(getattr(random, name), "__self__", None).__class__ is random.Random:
            yield random, name, _random(noted, name, getattr(random, name))
    urandom = _urandom(noted, os.urandom)
    yield os, "urandom", urandom
    yield random, "_urandom", urandom  # for SystemRandom and secrets
    yield random.Random, "seed", _seed(noted)
    yield uuid, "uuid1", _uuid(noted, "uuid1", uuid.uuid1, 1)
    yield uuid, "uuid4", _uuid(noted, "uuid4", uuid.uuid4, 4)


def _random(noted: Noted, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    what = f"random.{name}"

    def drawn(*args: Any, **named: Any) -> Any:
        guard = noted(FindingKind.RANDOMNESS, what)
        return original(*args, **named) if guard is None else getattr(guard.random, name)(*args, **named)

    return drawn


def _urandom(noted: Noted, original: Callable[[int], bytes]) -> Callable[[int], bytes]:
    def drawn(size: int) -> bytes:
        guard = noted(FindingKind.RANDOMNESS, "os.urandom")
        return original(size) if guard is None else guard.random.randbytes(size)

    return drawn


def _uuid(noted: Noted, name: str, original: Callable[..., uuid.UUID], version: int) -> Callable[..., uuid.UUID]:
    def made(*args: Any, **named: Any) -> uuid.UUID:
        guard = noted(FindingKind.RANDOMNESS, f"uuid.{name}")
        if guard is None:
            return original(*args, **named)
        return uuid.UUID(int=guard.random.getrandbits(128), version=version)

    return made


def _seed(noted: Noted) -> Callable[..., None]:
    """``Random()`` without a seed takes one of the system's."""
    original = random.Random.seed

    def seed(self: random.Random, a: Any = None, version: int = 2) -> None:
        if a is None and (guard := noted(FindingKind.RANDOMNESS, "random.Random without a seed")) is not None:
            a = guard.random.getrandbits(64)
        original(self, a, version)

    return seed


def _numpy_randoms(noted: Noted) -> Iterator[Substitute]:
    if "numpy" not in sys.modules:
        return
    module = importlib.import_module("numpy.random")  # it may load only when it is first used
    for name in module.__all__:
        function = getattr(module, name)
        if not isinstance(function, type) and callable(function):
            yield module, name, _numpy_random(noted, module, name, function)


def _numpy_random(noted: Noted, module: Any, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    what = f"numpy.random.{name}"
    state, default_rng = module.RandomState, name == "default_rng"

    def drawn(*args: Any, **named: Any) -> Any:
        if default_rng and ((args and args[0] is not None) or named.get("seed") is not None):
            return original(*args, **named)
        guard = noted(FindingKind.RANDOMNESS, what)
        if guard is None:
            return original(*args, **named)
        seed = guard.random.getrandbits(32)
        return original(seed) if default_rng else getattr(state(seed), name)(*args, **named)

    return drawn
