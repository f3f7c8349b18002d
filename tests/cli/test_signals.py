import os
import signal
import threading

import pytest

from dirtylog.cli.signals import EndOnSignals

SECONDS = 10.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_process_is_told(number: signal.Signals) -> None:
    told = threading.Event()
    with EndOnSignals() as signals:
        signals.watch(told.set)
        os.kill(os.getpid(), number)
        assert told.wait(SECONDS)


def test_signal_that_another_thread_takes_is_told_while_the_main_thread_waits_on_a_lock() -> None:
    told, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    with EndOnSignals() as signals:
        signals.watch(told.set)
        assert thread.ident is not None
        signal.pthread_kill(thread.ident, signal.SIGTERM)
        assert told.wait(SECONDS)
    done.set()
    thread.join()


def test_signal_before_anybody_watches_is_told_later() -> None:
    told = threading.Event()
    with EndOnSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        signals.watch(told.set)
        assert told.wait(SECONDS)


def test_handlers_and_wakeup_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with EndOnSignals() as signals:
        signals.watch(lambda: None)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
