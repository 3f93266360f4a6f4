"""Watches what handlers reach for besides their context: wall time, randomness, network, files, processes, threads.

In: a handler's run, between :meth:`Guard.begin` and :meth:`Guard.end`. Out: each :class:`Use` with the place in the
code. What reaches outside (:pep:`578` audit events) is blocked there with a NondeterminismError, and noted even where
the handler catches that. Clocks and random numbers have no audit events: while a guard is installed their functions are
replaced by ones that note, and answer otherwise in the second run of a step, so that the field which such a value
reaches shows as a difference too. Only code of handlers in the guard's own thread is affected; all else gets the real
thing, and when the guard is gone everything is as before.
"""

import builtins
import datetime
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from random import Random
from threading import get_ident
from types import FrameType, ModuleType
from typing import Any, Final

from agents.agent import Agent
from agents.errors import NondeterminismError
from agents.handler_loop import of_thread
from replay.findings import FindingKind
from replay.substitutes import classes, functions
from schemas.frozen import frozen

__all__ = ["Guard", "Use"]

_NETWORK, _FILE, _PROCESS, _CLOCK = FindingKind.NETWORK, FindingKind.FILE, FindingKind.PROCESS, FindingKind.CLOCK
_FAMILIES: Final = {
    **dict.fromkeys(
        ["socket", "urllib", "http", "ftplib", "imaplib", "nntplib", "poplib", "smtplib", "telnetlib", "webbrowser"],
        _NETWORK,
    ),
    **dict.fromkeys(["open", "shutil", "tempfile", "glob", "pathlib", "sqlite3", "mmap", "fcntl"], _FILE),
    **dict.fromkeys(["os", "subprocess", "ctypes", "pty", "signal", "syslog", "winreg", "_winapi", "msvcrt"], _PROCESS),
    "time": _CLOCK,
    "_thread": FindingKind.THREAD,
}
_OS_FILES: Final = frozenset(
    [
        "listdir",
        "scandir",
        "walk",
        "fwalk",
        "mkdir",
        "rmdir",
        "remove",
        "rename",
        "link",
        "symlink",
        "truncate",
        "utime",
        "chmod",
        "chown",
        "chflags",
        "lockf",
        "getxattr",
        "setxattr",
        "listxattr",
        "removexattr",
        "chdir",
    ]
)
_EXEMPT: Final = frozenset({"importlib", "linecache", "logging", "tokenize", "traceback", "warnings", "zipimport"})
"""What these do on a handler's behalf decides nothing: lines of a log, and the loading of code."""
_BOUNDARY: Final = frozenset({"agents.turns", "asyncio.events"})
"""Whose frames call a handler's code."""
_MACHINERY: Final = frozenset(
    f"agents.{name}"
    for name in ["agent", "context", "effects", "errors", "handler_loop", "journal", "ports", "step", "turns", "world"]
)
_NOT_THEIRS: Final = frozenset(
    {"schemas", "replay", "streams", "sinks", "magnatronic", "pydantic", "pydantic_core", "_pytest", "pytest"}
)

_SEEDS: Final = (0x5EED_0001, 0x5EED_0002)

_kinds: dict[str, FindingKind | None] = {}
_running: "Guard | None" = None
_hooked = False


@frozen
class Use:
    """A handler's use of something that is not its own: what kind, which function, and where in the code."""

    kind: FindingKind
    what: str
    where: str


class Guard:
    """Watches the handlers of ``agents``; install it with :meth:`installed`, once for many runs.

    >>> guard = Guard([agent])
    >>> with guard.installed():
    ...     guard.begin(second=False)
    ...     ...  # run the handler
    ...     uses = guard.end()
    """

    def __init__(self, agents: Iterable[Agent[Any]] = ()) -> None:
        self._packages = {base.__module__.partition(".")[0] for agent in agents for base in type(agent).__mro__}
        self._packages.add("agents")
        self._thread = get_ident()
        self._uses: list[Use] = []
        self._undo: list[tuple[Any, str, Any]] = []
        self._installed = 0
        self.second = False
        self._random: Random | None = None

    @contextmanager
    def installed(self) -> Iterator["Guard"]:
        """Replace clocks and random numbers, and put them back at the end. To be used by one thread; may be nested."""
        self._installed += 1
        if self._installed == 1:
            self._install()
        try:
            yield self
        finally:
            self._installed -= 1
            if not self._installed:
                for target, name, value in reversed(self._undo):
                    setattr(target, name, value)
                self._undo.clear()

    @property
    def is_installed(self) -> bool:
        """Whether clocks and random numbers are replaced now."""
        return self._installed > 0

    def begin(self, *, second: bool) -> None:
        """Watch from here on; ``second`` shifts clocks and random numbers."""
        global _running
        self.second = second
        self._random = None
        if self._uses:
            self._uses = []
        _running = self

    def end(self) -> tuple[Use, ...]:
        """Watch no more; what was used, each place once."""
        global _running
        _running = None
        return tuple(dict.fromkeys(self._uses)) if self._uses else ()

    @property
    def random(self) -> Random:
        """Random numbers for this run of the handler, others than for the other one."""
        if self._random is None:
            self._random = Random(_SEEDS[self.second])
        return self._random

    def watches(self) -> bool:
        """Whether a handler's code runs in this thread, watched."""
        return self._thread == get_ident() and of_thread.loop.owner is not None

    def use(self, kind: FindingKind, what: str, frame: FrameType | None) -> Use | None:
        """Note a use, unless it is on behalf of what decides nothing."""
        where = ""
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module in _BOUNDARY:
                break
            if module.partition(".")[0] in _EXEMPT or module == functions.__module__:
                return None
            if not where and module.partition(".")[0] not in sys.stdlib_module_names and module != __name__:
                where = f"{module}.{frame.f_code.co_qualname}, line {frame.f_lineno}"
            frame = frame.f_back
        used = Use(kind, what, where)
        self._uses.append(used)
        return used

    # What is replaced while it is installed.

    def _install(self) -> None:
        _hook_once()
        self._thread = get_ident()
        replaced: dict[int, Any] = {}
        originals = []  # held, so that no id is given again
        for target, name, made in list(functions(_noted)):
            originals.append(getattr(target, name))
            replaced[id(originals[-1])] = made
            self._set(target, name, made)
        replaced_classes = classes(_noted)
        self._set(builtins, "__import__", _import(builtins.__import__, replaced_classes[id(datetime)]))
        for module in list(sys.modules.values()):
            top = getattr(module, "__name__", "").partition(".")[0]
            if not top or top in sys.stdlib_module_names or top in _NOT_THEIRS or module.__name__ in _MACHINERY:
                continue
            own = top in self._packages or "-packages" not in (getattr(module, "__file__", None) or "-packages")
            for name, value in list(vars(module).items()):
                found = replaced.get(id(value)) or (replaced_classes.get(id(value)) if own else None)
                if found is not None:
                    self._set(module, name, found)

    def _set(self, target: Any, name: str, value: Any) -> None:
        self._undo.append((target, name, vars(target)[name] if isinstance(target, type) else getattr(target, name)))
        setattr(target, name, value)


def _noted(kind: FindingKind, what: str) -> Guard | None:
    """The guard, when a watched handler's code has just used something; it is noted. For what replaces that, two frames
    below its user.
    """
    guard = _running
    if guard is None or not guard.watches() or guard.use(kind, what, sys._getframe(2)) is None:
        return None
    return guard


def _hook_once() -> None:
    global _hooked
    if not _hooked:
        sys.addaudithook(_audit)  # for good: an audit hook can't be taken away
        _hooked = True


def _audit(event: str, args: tuple[Any, ...]) -> None:
    guard = _running
    if guard is None:
        return
    kind = _kinds[event] if event in _kinds else _kind_of(event)
    if kind is None or not guard.watches():
        return
    used = guard.use(kind, event, sys._getframe(1))
    if used is not None:
        told = ", ".join(repr(each)[:80] for each in args[:2])
        raise NondeterminismError(
            f"{event}({told}) at {used.where}: a handler reaches outside only through ctx, which records it"
        )


def _kind_of(event: str) -> FindingKind | None:
    family, _, name = event.partition(".")
    kind = _FAMILIES.get(family)
    if family == "os" and name in _OS_FILES:
        kind = _FILE
    _kinds[event] = kind
    return kind


def _import(original: Callable[..., Any], instead: ModuleType) -> Callable[..., Any]:
    """``import datetime`` within a handler gives it the guarded classes."""

    def guarded(name: str, *args: Any, **named: Any) -> Any:
        module = original(name, *args, **named)
        if module is datetime and _running is not None and _running.watches():
            top = str((args[0] or {}).get("__name__", "") if args else "").partition(".")[0]
            if top not in sys.stdlib_module_names and top not in _NOT_THEIRS:
                return instead
        return module

    return guarded
