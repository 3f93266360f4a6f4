"""The long chaos run: ``make chaos``, or ``python -m tests.chaos``.

In: environment. CHAOS_EVENTS (1,000,000), CHAOS_FAULTS (50), CHAOS_BROKERS (1 or 3), CHAOS_SEED (by the clock),
CHAOS_RATE (events fed a second), CHAOS_CALLS (the share of events that make calls), CHAOS_SESSION_MS (the product's
10,000), CHAOS_WORKERS, CHAOS_FOLDER (kept; by default a temporary one, kept after a failure).
Out: each fault with its time, and a table of figures; exit status 1 and all that is known when an invariant is broken.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.harness.checks import ChaosError
from tests.chaos.harness.report import table
from tests.chaos.harness.run import Options, run_chaos


def main() -> int:
    given = os.environ.get
    options = Options(
        events=int(given("CHAOS_EVENTS", "1000000")),
        faults=int(given("CHAOS_FAULTS", "50")),
        brokers=int(given("CHAOS_BROKERS", "1")),
        seed=int(given("CHAOS_SEED", str(int(time.time())))),
        rate=float(given("CHAOS_RATE", "4000")),
        calls_share=float(given("CHAOS_CALLS", "0.1")),
        session_timeout_ms=int(given("CHAOS_SESSION_MS", "10000")),
        workers=int(given("CHAOS_WORKERS", "3")),
        quiet_s=900.0,
    )
    chosen = given("CHAOS_FOLDER")
    folder = Path(chosen) if chosen else Path(tempfile.mkdtemp(prefix="magnatronic-chaos-"))
    print(f"seed {options.seed}: the same plan again with CHAOS_SEED={options.seed}", flush=True)
    try:
        report = run_chaos(options, folder, lambda line: print(line, flush=True))
    except ChaosError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print(f"\n{table(report)}")
    if not chosen:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
