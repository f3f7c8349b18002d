import threading

import pytest
from support.waiting import BOUND, wait_until

from dirtylog.errors import DirtylogError, HostError
from dirtylog.machine.kvm.reaper import Reaper

SOON = 0.001


def refuse(error: DirtylogError) -> None:
    raise AssertionError(error)


def test_reaper_comes_again_and_again_until_it_is_closed() -> None:
    threads, calls = threading.active_count(), [0]

    def reap() -> None:
        calls[0] += 1

    reaper = Reaper(reap, refuse, period=SOON)
    wait_until(lambda: calls[0] > 3, "it came more than once")
    reaper.close()
    reaper.close()
    assert threading.active_count() == threads


def test_reaper_that_waits_ends_at_once() -> None:
    Reaper(lambda: None, refuse, period=10 * BOUND).close()


@pytest.mark.parametrize("error", [HostError("no more"), ZeroDivisionError()], ids=["refused", "defect"])
def test_first_failure_is_told_and_ends_it(error: Exception) -> None:
    told: list[DirtylogError] = []
    heard = threading.Event()

    def reap() -> None:
        raise error

    def failed(failure: DirtylogError) -> None:
        told.append(failure)
        heard.set()

    reaper = Reaper(reap, failed, period=SOON)
    assert heard.wait(BOUND)
    reaper.close()
    (failure,) = told
    assert error in (failure, failure.__cause__)
