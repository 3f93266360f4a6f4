"""How a process that runs processors collects garbage.

In: nothing. Out: the interpreter's collector, set for thousands of events in flight. Each of those is dozens of live
objects. With the default thresholds (700, 10, 10) the collector goes over them again and again and finds nothing, since
what a processor leaves behind is freed by reference counts. Measured on the typed step: 67 µs of CPU an event with the
defaults, 46 with these.
"""

import gc
from typing import Final

__all__ = ["settle_garbage_collector"]

_THRESHOLDS: Final = (50_000, 20, 50)


def settle_garbage_collector() -> None:
    """Set what is loaded by now apart from collection, and look for cycles among new objects seldom.

    To be called once the process has imported and opened what it needs. Calling it again does no harm.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
