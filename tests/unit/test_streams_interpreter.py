import gc
import sys

from streams.interpreter import collecting_seldom, switching_soon


def test_the_collector_is_as_it_was_afterwards() -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    with collecting_seldom():
        assert gc.get_threshold()[0] > before[0][0]
        assert gc.get_freeze_count() > before[1]
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


def test_threads_switch_sooner_only_while_processors_run() -> None:
    before = sys.getswitchinterval()
    with switching_soon():
        assert sys.getswitchinterval() < before / 5
    assert sys.getswitchinterval() == before
