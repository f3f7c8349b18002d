import os
from collections.abc import Iterator
from contextlib import closing

import pytest
from support.devices import ByteDevice
from support.fake_machine import FakeMachine

from dirtylog.errors import HostError
from dirtylog.linux import kvm_abi
from dirtylog.linux.kvm import VM
from dirtylog.machine import RunState
from dirtylog.machine.kvm.io import IOListener
from dirtylog.memory import Client, IOEventFD, Memory, MemoryListener, MemoryRegionSection, TrackingReason
from dirtylog.units import PAGE_SIZE


class StopFails(MemoryListener):
    """Cannot stop logging."""

    def log_stop(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        raise HostError("the log goes on")


class Watched(FakeMachine):
    """Counts how often its writers are let go."""

    runs = 0

    def _run(self) -> None:
        self.runs += 1
        super()._run()


@pytest.fixture
def machine() -> Iterator[Watched]:
    with closing(Watched(writes=False)) as machine:
        yield machine


def test_machine_runs_as_its_state_says_though_a_listener_raises(machine: Watched) -> None:  # T11 T12
    seen: list[tuple[RunState, RunState]] = []
    machine.observers.append(lambda old, new: seen.append((old, new)))
    machine.memory.register(StopFails(), machine.memory.address_spaces[0])
    machine.memory.start_logging(TrackingReason.MIGRATION)
    machine.memory.set_running(False)
    machine.memory.stop_logging(TrackingReason.MIGRATION)

    with pytest.raises(HostError, match="the log goes on"):
        machine.resume()

    assert (machine.state, machine.runs) == (RunState.RUNNING, 1)
    assert seen == [(RunState.PRELAUNCH, RunState.RUNNING)]
    assert not machine.memory.tracking
    machine.resume()
    assert machine.runs == 1
    machine.pause()
    assert machine.state is RunState.PAUSED


class EventFDTable(VM):
    """What KVM would hold. An eventfd is let go only by the address, size and match that it was assigned with."""

    def __init__(self) -> None:
        self.assigned: set[tuple[int, int, int, int]] = set()

    def assign_eventfd(self, eventfd: kvm_abi.IOEventFD, *, assign: bool) -> None:
        entry = eventfd.addr, eventfd.len, eventfd.datamatch, eventfd.fd
        if assign:
            self.assigned.add(entry)
        else:
            self.assigned.remove(entry)


def test_eventfd_is_let_go_as_it_was_assigned_though_another_device_shows_it_now() -> None:  # E1 E3
    vm = EventFDTable()
    memory = Memory()
    root = memory.container("root")
    little = memory.mmio("little", PAGE_SIZE, ByteDevice(PAGE_SIZE))
    big = memory.mmio("big", PAGE_SIZE, ByteDevice(PAGE_SIZE, byte_order="big"))
    root.add(little, 0)
    memory.register(IOListener(vm, pio=False), memory.address_space("space", root))
    bell = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        for device in (little, big):
            device.add_eventfd(IOEventFD(0, 4, match_data=True, data=1, fd=bell))
        with memory.transaction():
            root.remove(little)
            root.add(big, 0)
        root.remove(big)
    finally:
        os.close(bell)
        memory.close()

    assert vm.assigned == set()
