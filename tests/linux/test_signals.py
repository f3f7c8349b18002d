import signal
import threading
from types import FrameType

from dirtylog.linux.signals import signals_blocked


def _blocked() -> set[int]:
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())}


def test_all_signals_that_can_be_blocked_are_and_only_meanwhile() -> None:
    before = _blocked()
    with signals_blocked():
        assert _blocked() == {*map(int, signal.valid_signals())} - {signal.SIGKILL, signal.SIGSTOP}
    assert _blocked() == before


def test_signals_that_were_blocked_stay_so() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        with signals_blocked():
            pass
        assert signal.SIGUSR2 in _blocked()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_signal_that_comes_meanwhile_is_delivered_afterwards() -> None:
    came: list[bool] = []
    inside = True

    def handler(_: int, __: FrameType | None) -> None:
        came.append(inside)

    old = signal.signal(signal.SIGUSR1, handler)
    try:
        with signals_blocked():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            assert signal.SIGUSR1 in signal.sigpending()
            inside = False
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert came == [False]
