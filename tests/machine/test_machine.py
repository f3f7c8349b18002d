from collections.abc import Callable

import pytest

from dirtylog.errors import GuestError, HostError, UsageError
from dirtylog.machine import Machine, MachineState, RunState
from dirtylog.memory import Memory, TrackingReason


class Toy(Machine):
    """Writes down when its writers are let go and stopped."""

    kind = "toy"

    def __init__(self) -> None:
        super().__init__(Memory())
        self.calls: list[str] = []
        self.changes: list[tuple[RunState, RunState]] = []
        self.observers.append(lambda old, new: self.changes.append((old, new)))
        self.while_stopping: Callable[[], None] = lambda: None

    def end(self, state: RunState = RunState.SHUTDOWN) -> None:
        self._end(state, GuestError("the guest gave up"))

    def _throttle(self, share: float) -> None:
        self.calls.append(f"throttle {share:g}")

    def _run(self) -> None:
        self.calls.append("run")

    def _stop(self) -> None:
        self.calls.append("stop")
        self.while_stopping()

    def save_state(self) -> MachineState:
        return {}

    def load_state(self, state: MachineState) -> None:
        raise UsageError("a toy has no state")

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def toy() -> Toy:
    return Toy()


def test_new_machine_stands_still(toy: Toy) -> None:
    assert (toy.state, toy.calls, toy.failure) == (RunState.PRELAUNCH, [], None)


def test_resume_and_pause_act_once(toy: Toy) -> None:
    for call in (toy.resume, toy.resume, toy.pause, toy.pause, toy.resume):
        call()

    assert toy.calls == ["run", "stop", "run"]
    assert toy.changes == [
        (RunState.PRELAUNCH, RunState.RUNNING),
        (RunState.RUNNING, RunState.PAUSED),
        (RunState.PAUSED, RunState.RUNNING),
    ]


@pytest.mark.parametrize("end", [RunState.SHUTDOWN, RunState.INTERNAL_ERROR])
def test_machine_that_ended_does_not_run_again(toy: Toy, end: RunState) -> None:
    toy.resume()
    toy.end(end)
    toy.end(RunState.SHUTDOWN)

    assert toy.state is end
    assert isinstance(toy.failure, GuestError)
    toy.pause()
    with pytest.raises(UsageError, match=f"has ended \\({end.value}\\) and cannot run"):
        toy.resume()
    assert toy.calls == ["run", "stop"]  # other writers than the one that ended it may have run on
    assert toy.changes[-1] == (RunState.RUNNING, end)


@pytest.mark.parametrize("held", [RunState.INMIGRATE, RunState.FINISH_MIGRATE])
def test_machine_that_a_migration_holds_obeys_nobody_else(toy: Toy, held: RunState) -> None:
    toy.resume()
    toy.hold(held)
    assert (toy.state, toy.calls) == (held, ["run", "stop"])

    for call in (toy.resume, toy.pause):
        with pytest.raises(UsageError, match="in the hands of a migration") as caught:
            call()
        assert caught.value.remedy is not None
    assert toy.state is held

    toy.release(RunState.RUNNING)
    assert (toy.state, toy.calls) == (RunState.RUNNING, ["run", "stop", "run"])


def test_machine_that_stood_still_is_held_and_released_standing_still(toy: Toy) -> None:
    toy.hold(RunState.FINISH_MIGRATE)
    toy.release(RunState.PAUSED)
    toy.release(RunState.RUNNING)

    assert (toy.state, toy.calls) == (RunState.PAUSED, [])


def test_machine_that_is_released_to_an_end_never_runs_again_and_says_why(toy: Toy) -> None:
    toy.resume()
    toy.hold(RunState.FINISH_MIGRATE)
    failure = HostError("no memory", remedy="more")
    toy.release(RunState.INTERNAL_ERROR, failure)
    assert (toy.state, toy.failure, toy.calls) == (RunState.INTERNAL_ERROR, failure, ["run", "stop"])
    with pytest.raises(UsageError, match="has ended"):
        toy.resume()


def test_guest_that_ended_cannot_be_held(toy: Toy) -> None:
    toy.resume()
    toy.end()
    with pytest.raises(GuestError, match="gave up"):
        toy.hold(RunState.FINISH_MIGRATE)
    assert toy.state is RunState.SHUTDOWN


def test_guest_that_ends_while_it_is_stopped_is_not_called_paused(toy: Toy) -> None:
    toy.resume()
    toy.while_stopping = toy.end
    with pytest.raises(GuestError, match="gave up"):
        toy.pause()
    assert toy.state is RunState.SHUTDOWN


def test_logging_that_ends_while_the_machine_stands_still_ends_when_it_runs(toy: Toy) -> None:  # T12
    memory = toy.memory
    for _ in range(2):
        memory.start_logging(TrackingReason.MIGRATION)
        memory.stop_logging(TrackingReason.MIGRATION)
        assert memory.tracking == TrackingReason.MIGRATION
        toy.resume()
        assert not memory.tracking
        memory.start_logging(TrackingReason.MIGRATION)
        memory.stop_logging(TrackingReason.MIGRATION)
        assert not memory.tracking
        toy.pause()


def test_observer_may_remove_itself(toy: Toy) -> None:
    def once(old: RunState, new: RunState) -> None:
        toy.observers.remove(once)

    toy.observers.insert(0, once)
    toy.resume()
    toy.pause()
    assert len(toy.changes) == 2


def test_throttle_is_told_once_and_ended_once(toy: Toy) -> None:
    for share in (0.0, 0.5, 0.5, 0.99, 0.0, 0.0):
        toy.throttle(share)
        assert toy.throttled == share
    assert toy.calls == ["throttle 0.5", "throttle 0.99", "throttle 0"]


@pytest.mark.parametrize("share", [-0.01, 0.991, 1.0, float("nan"), float("inf")])
def test_share_that_cannot_be_taken_is_refused(toy: Toy, share: float) -> None:
    with pytest.raises(UsageError, match="a throttle of") as caught:
        toy.throttle(share)
    assert caught.value.remedy is not None
    assert (toy.calls, toy.throttled) == ([], 0.0)
