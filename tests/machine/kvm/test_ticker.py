import threading

import pytest
from support.waiting import BOUND, wait_until

from dirtylog.errors import DirtylogError, HostError
from dirtylog.machine.kvm.ticker import Ticker

SOON = 0.001


def refuse(error: DirtylogError) -> None:
    raise AssertionError(error)


def test_ticker_comes_again_and_again_until_it_is_closed() -> None:
    threads, calls = threading.active_count(), [0]

    def tick() -> float:
        calls[0] += 1
        return SOON

    ticker = Ticker("ticker", tick, refuse)
    wait_until(lambda: calls[0] > 3, "it came more than once")
    ticker.close()
    ticker.close()
    assert threading.active_count() == threads


def test_ticker_that_waits_ends_at_once() -> None:
    Ticker("ticker", lambda: 10 * BOUND, refuse).close()


@pytest.mark.parametrize("error", [HostError("no more"), ZeroDivisionError()], ids=["refused", "defect"])
def test_first_failure_is_told_and_ends_it(error: Exception) -> None:
    told: list[DirtylogError] = []
    heard = threading.Event()

    def tick() -> float:
        raise error

    def failed(failure: DirtylogError) -> None:
        told.append(failure)
        heard.set()

    ticker = Ticker("ticker", tick, failed)
    assert heard.wait(BOUND)
    ticker.close()
    (failure,) = told
    assert error in (failure, failure.__cause__)
