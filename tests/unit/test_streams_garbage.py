import gc

from streams.garbage import collecting_seldom


def test_the_collector_is_as_it_was_afterwards() -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    with collecting_seldom():
        assert gc.get_threshold()[0] > before[0][0]
        assert gc.get_freeze_count() > before[1]
    assert (gc.get_threshold(), gc.get_freeze_count()) == before
