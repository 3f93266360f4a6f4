import subprocess
import sys
from pathlib import Path

from streams.slots import SlotLock


def test_the_lowest_free_slot_is_taken_and_given_back(tmp_path: Path) -> None:
    with SlotLock(tmp_path, "g") as first, SlotLock(tmp_path, "g") as second, SlotLock(tmp_path, "other") as other:
        assert (first.slot, second.slot, other.slot) == (0, 1, 0)
        first.release()
        first.release()
        with SlotLock(tmp_path, "g") as again:
            assert again.slot == 0


def test_a_killed_process_frees_its_slot(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from streams.slots import SlotLock\n"
        "lock = SlotLock(pathlib.Path(sys.argv[1]), 'g')\n"
        "print(lock.slot, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        with SlotLock(tmp_path, "g") as lock:
            assert lock.slot == 1
    finally:
        process.kill()
        process.communicate()
    with SlotLock(tmp_path, "g") as lock:
        assert lock.slot == 0
