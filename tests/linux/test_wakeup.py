import socket

from dirtylog.linux.wakeup import Waiter, Wakeup


def test_wait_ends_when_the_flag_is_set() -> None:
    near, far = socket.socketpair()
    wakeup = Wakeup()
    with near, far:
        wakeup.set()
        Waiter(near.fileno(), wakeup).wait(read=True)
    wakeup.close()


def test_wait_ends_when_the_file_is_ready() -> None:
    near, far = socket.socketpair()
    wakeup = Wakeup()
    with near, far:
        waiter = Waiter(near.fileno(), wakeup)
        waiter.wait(write=True)
        far.send(b"x")
        waiter.wait(read=True)
    wakeup.close()


def test_cleared_flag_wakes_nobody() -> None:
    near, far = socket.socketpair()
    wakeup = Wakeup()
    with near, far:
        wakeup.set()
        wakeup.set()
        wakeup.clear()
        wakeup.clear()
        Waiter(near.fileno(), wakeup).wait(read=True, timeout=0)
    wakeup.close()


def test_close_may_be_repeated() -> None:
    wakeup = Wakeup()
    wakeup.close()
    wakeup.close()
    assert wakeup.fileno() < 0


def test_wait_says_whether_anything_happened_before_time_was_up() -> None:
    near, far = socket.socketpair()
    wakeup = Wakeup()
    with near, far:
        waiter = Waiter(near.fileno(), wakeup)
        assert not waiter.wait(read=True, timeout=0.0)
        assert not waiter.wait(read=True, timeout=-1.0)
        far.send(b"x")
        assert waiter.wait(read=True, timeout=0.0)
    wakeup.close()


def test_wait_ends_when_another_file_can_be_read() -> None:
    near, far = socket.socketpair()
    one, other = socket.socketpair()
    wakeup = Wakeup()
    with near, far, one, other:
        waiter = Waiter(near.fileno(), wakeup, one.fileno())
        assert not waiter.wait(read=True, timeout=0.0)
        other.close()
        assert waiter.wait(read=True)
    wakeup.close()
