import threading

from support.waiting import BOUND, Task

from dirtylog.memory.lock import TopologyLock


def is_mine(lock: TopologyLock) -> bool:
    return lock.mine


def test_lock_is_mine_from_the_first_entry_to_the_last_exit() -> None:
    lock = TopologyLock()
    assert not is_mine(lock)
    with lock:
        with lock:
            assert is_mine(lock)
        assert is_mine(lock)
    assert not is_mine(lock)


def test_lock_of_another_thread_is_not_mine_and_keeps_me_out() -> None:
    lock = TopologyLock()
    entered = threading.Event()
    order: list[str] = []

    def other() -> None:
        entered.set()
        assert not is_mine(lock)
        with lock:
            assert is_mine(lock)
            order.append("other")

    with lock:
        task = Task(other)
        assert entered.wait(BOUND)
        order.append("me")
    task.join()
    assert order == ["me", "other"]
    assert not is_mine(lock)
