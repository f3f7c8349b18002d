import os
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from support.running import COUNTER, DEVICE, VALUE, MakeRunning, Recorder, Running, count_exits, listing, load, store
from support.waiting import BOUND, wait_until

from dirtylog.errors import GuestError, KernelError
from dirtylog.linux.kvm_abi import COALESCED_ENTRIES
from dirtylog.machine import BootMode, RunState
from dirtylog.memory import IOEventFD
from dirtylog.units import MIB, PAGE_SIZE

SIZES = (1, 2, 4, 8)


def low(size: int) -> int:
    """What `store` writes."""
    return VALUE % (1 << 8 * size)


class Bell:
    """An eventfd."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def rung(self) -> int:
        """How often, since the last time this was asked."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        os.close(self.fd)

    def at(self, address: int, size: int, data: int | None = None) -> IOEventFD:
        """Signalled by writes to an address: of any data if None."""
        return IOEventFD(address, size, data is not None, data or 0, self.fd)


@pytest.fixture
def make_bell(kvm: object) -> Iterator[Callable[[], Bell]]:
    """Makes eventfds; closes them."""
    made: list[Bell] = []

    def make() -> Bell:
        made.append(Bell())
        return made[-1]

    yield make
    for bell in made:
        bell.close()


@pytest.fixture
def bell(make_bell: Callable[[], Bell]) -> Bell:
    return make_bell()


@pytest.mark.parametrize("size", SIZES)
def test_write_of_the_size_signals_without_an_exit(
    run: MakeRunning, monkeypatch: pytest.MonkeyPatch, bell: Bell, size: int
) -> None:
    guest, device, exits = run(), Recorder(), count_exits(monkeypatch)
    guest.map(device).add_eventfd(bell.at(8, size))

    guest.run(store(DEVICE + 8, size) * 3, BootMode.LONG)

    assert bell.rung() == 3
    assert device.accesses == []
    assert exits == []


def test_other_accesses_of_the_address_reach_the_device(run: MakeRunning, bell: Bell) -> None:
    guest, device = run(), Recorder()
    guest.map(device).add_eventfd(bell.at(8, 4))

    guest.run(store(DEVICE + 8, 2) + load(DEVICE + 8, 4) + store(DEVICE + 12, 4), BootMode.LONG)

    assert bell.rung() == 0
    assert device.accesses == [("write", 8, 2, low(2)), ("read", 8, 4), ("write", 12, 4, low(4))]


@pytest.mark.parametrize("size", SIZES)
def test_only_matching_data_signals(run: MakeRunning, make_bell: Callable[[], Bell], size: int) -> None:
    guest, device, one, two = run(), Recorder(), make_bell(), make_bell()
    region = guest.map(device)
    region.add_eventfd(one.at(8, size, 1))
    region.add_eventfd(two.at(8, size, low(size)))

    guest.run(b"".join(store(DEVICE + 8, size, value) for value in (1, VALUE, 2, 1)), BootMode.LONG)

    assert (one.rung(), two.rung()) == (2, 1)
    assert device.accesses == [("write", 8, size, 2)]


def test_data_is_matched_as_a_big_endian_device_has_it(run: MakeRunning, bell: Bell) -> None:
    guest, device = run(), Recorder(byte_order="big")
    region = guest.map(device)
    region.add_eventfd(bell.at(8, 4, 0x11223344))
    guest.run(store(DEVICE + 8, 4, 0x44332211) + store(DEVICE + 8, 4, 0x11223344), BootMode.LONG)
    assert bell.rung() == 1
    assert device.written == [0x44332211]
    region.remove_eventfd(bell.at(8, 4, 0x11223344))


def test_eventfd_of_no_length_takes_writes_of_all(run: MakeRunning, bell: Bell) -> None:  # E4
    guest, device = run(), Recorder()
    guest.map(device).add_eventfd(bell.at(8, 0))
    guest.run(b"".join(store(DEVICE + 8, size) for size in SIZES) + store(DEVICE + 16, 4), BootMode.LONG)
    assert bell.rung() == 4
    assert device.accesses == [("write", 16, 4, low(4))]


OUT = listing("""
    ba10050000  mov $0x510, %edx
    b811223344  mov $0x44332211, %eax
    ee          out %al, %dx
    66ef        out %ax, %dx
    ef          out %eax, %dx
""")


@pytest.mark.parametrize(
    ("size", "data", "rung", "written"),
    [
        (0, None, 3, []),
        (1, None, 1, [0x2211, 0x44332211]),
        (2, None, 1, [0x11, 0x44332211]),
        (4, None, 1, [0x11, 0x2211]),
        (2, 0x2211, 1, [0x11, 0x44332211]),
        (4, 0x2211, 0, [0x11, 0x2211, 0x44332211]),
    ],
)
def test_port_signals(run: MakeRunning, bell: Bell, size: int, data: int | None, rung: int, written: list[int]) -> None:
    guest, device = run(), Recorder()
    region = guest.map_ports(device, 8, 0x510)
    region.add_eventfd(bell.at(0, size, data))
    guest.run(OUT)
    assert (bell.rung(), device.written) == (rung, written)

    region.remove_eventfd(bell.at(0, size, data))
    guest.run(OUT)
    assert (bell.rung(), device.written) == (0, [*written, 0x11, 0x2211, 0x44332211])


@pytest.mark.parametrize(("size", "data"), [(4, None), (4, low(4)), (0, None)])
def test_removed_eventfd_leaves_writes_to_the_device(run: MakeRunning, bell: Bell, size: int, data: int | None) -> None:
    guest, device = run(), Recorder()
    region = guest.map(device)
    for _ in range(2):
        region.add_eventfd(bell.at(8, size, data))
        guest.run(store(DEVICE + 8, 4), BootMode.LONG)
        assert (bell.rung(), device.accesses) == (1, [])

        region.remove_eventfd(bell.at(8, size, data))
        guest.run(store(DEVICE + 8, 4), BootMode.LONG)
        assert (bell.rung(), device.accesses) == (0, [("write", 8, 4, low(4))])
        device.accesses.clear()


def test_eventfd_goes_where_its_region_is_seen(run: MakeRunning, bell: Bell) -> None:  # E3
    guest, device = run(), Recorder()
    region = guest.map(device)
    region.add_eventfd(bell.at(8, 4))
    guest.root.add(guest.memory.alias("again", region, 0, PAGE_SIZE), DEVICE + 4 * MIB)
    ring = store(DEVICE + 8, 4) + store(DEVICE + MIB + 8, 4) + store(DEVICE + 4 * MIB + 8, 4)

    guest.run(ring, BootMode.LONG)
    assert bell.rung() == 2
    region.move(DEVICE + MIB)
    guest.run(ring, BootMode.LONG)
    assert bell.rung() == 2
    region.set_enabled(False)
    guest.run(ring, BootMode.LONG)
    assert (bell.rung(), device.accesses) == (0, [])
    region.set_enabled(True)
    guest.run(ring, BootMode.LONG)
    assert (bell.rung(), device.accesses) == (2, [])


def test_eventfds_change_while_the_guest_runs(run: MakeRunning, bell: Bell) -> None:
    guest, device = run(), Recorder()
    region = guest.map(device)
    guest.start(RING_FOR_EVER)
    for _ in range(20):
        wait_until(lambda: device.accesses, "a write reached the device")
        region.add_eventfd(bell.at(8, 4))
        bell.rung()
        wait_until(bell.rung, "a write rang")
        region.remove_eventfd(bell.at(8, 4))
        device.accesses.clear()


RING_FOR_EVER = listing("""
    a3080000d0  1: mov %eax, 0xd0000008
    ebf9        jmp 1b
""")


def test_eventfd_that_kvm_refuses_is_an_error_and_leaves_the_others(  # T11
    run: MakeRunning, make_bell: Callable[[], Bell]
) -> None:
    guest, device, one, two = run(), Recorder(), make_bell(), make_bell()
    region = guest.map(device)
    region.add_eventfd(one.at(8, 4))
    with pytest.raises(KernelError, match="KVM_IOEVENTFD"):
        region.add_eventfd(two.at(8, 4))

    guest.run(store(DEVICE + 8, 4), BootMode.LONG)
    assert (one.rung(), two.rung()) == (1, 0)
    region.remove_eventfd(two.at(8, 4))
    guest.run(store(DEVICE + 8, 4), BootMode.LONG)
    assert (one.rung(), device.accesses) == (1, [])
    with pytest.raises(KernelError):
        region.add_eventfd(two.at(8, 4))  # as it is when the machine is closed


def test_number_that_is_no_open_file_is_refused(run: MakeRunning, bell: Bell) -> None:
    region = run().map(Recorder())
    with pytest.raises(KernelError, match=f"dup of the eventfd {1 << 20} failed"):
        region.add_eventfd(IOEventFD(0, 4, False, 0, 1 << 20))


def test_eventfd_may_be_closed_before_it_is_removed(run: MakeRunning) -> None:
    guest, device, bell = run(), Recorder(), Bell()
    region = guest.map(device)
    region.add_eventfd(bell.at(8, 4))
    bell.close()
    with closing(Bell()) as other:  # with the same number
        assert other.fd == bell.fd
        guest.run(store(DEVICE + 8, 4), BootMode.LONG)
        assert (other.rung(), device.accesses) == (0, [])
        region.remove_eventfd(bell.at(8, 4))
    guest.run(store(DEVICE + 8, 4), BootMode.LONG)
    assert device.accesses == [("write", 8, 4, low(4))]


WRITE_THREE = listing("""
    b801000000    mov $1, %eax
    a3000000d0    1: mov %eax, 0xd0000000
    40            inc %eax
    83f804        cmp $4, %eax
    75f5          jne 1b
    ff0500500000  incl 0x5000
    ebfe          jmp .
""")
READ_AFTER_THREE = listing("""
    b801000000  mov $1, %eax
    a3000000d0  1: mov %eax, 0xd0000000
    40          inc %eax
    83f804      cmp $4, %eax
    75f5        jne 1b
    a1001000d0  mov 0xd0001000, %eax
""")


def wait_for_the_end(guest: Running) -> None:
    wait_until(lambda: guest.word(COUNTER), "the guest came to the end of its writes")


def test_coalesced_writes_come_late_and_in_order(run: MakeRunning) -> None:  # E7
    guest, device = run(), Recorder()
    guest.map(device).add_coalescing(0, 4)
    guest.start(WRITE_THREE)
    wait_for_the_end(guest)
    assert device.accesses == []

    with guest.memory.transaction():
        assert device.accesses == [("write", 0, 4, value) for value in (1, 2, 3)]
    guest.machine.pause()
    assert device.written == [1, 2, 3]


def test_pause_delivers_coalesced_writes(run: MakeRunning) -> None:
    guest, device = run(), Recorder()
    guest.map(device).add_coalescing(0, 4)
    guest.start(WRITE_THREE)
    wait_for_the_end(guest)

    guest.machine.pause()

    assert device.written == [1, 2, 3]
    guest.machine.save_state()
    assert device.written == [1, 2, 3]


def test_next_exit_comes_after_coalesced_writes(run: MakeRunning) -> None:
    guest, device = run(), Recorder()
    guest.map(device).add_coalescing(0, 4)
    guest.run(READ_AFTER_THREE)
    assert device.accesses == [*(("write", 0, 4, value) for value in (1, 2, 3)), ("read", 0x1000, 4)]


def test_access_by_the_host_comes_after_coalesced_writes(run: MakeRunning) -> None:  # E7
    guest, device = run(), Recorder()
    guest.map(device).add_coalescing(0, 4)
    guest.start(WRITE_THREE)
    wait_for_the_end(guest)

    guest.system.read(DEVICE + 0x1000, 4)

    assert device.accesses == [*(("write", 0, 4, value) for value in (1, 2, 3)), ("read", 0x1000, 4)]


WRITE_MANY = listing("""
    b801000000  mov $1, %eax
    a3000000d0  1: mov %eax, 0xd0000000
    40          inc %eax
    3de9030000  cmp $1001, %eax
    75f3        jne 1b
""")


def test_full_ring_loses_nothing_and_keeps_the_order(run: MakeRunning) -> None:
    guest, device = run(), Recorder()
    guest.map(device).add_coalescing(0, 4)
    assert 3 * COALESCED_ENTRIES < 1000
    guest.run(WRITE_MANY)
    assert device.written == list(range(1, 1001))


INTERLEAVE = listing("""
    ba10050000    mov $0x510, %edx
    b801000000    mov $1, %eax
    ee            1: out %al, %dx
    40            inc %eax
    a3000000d0    mov %eax, 0xd0000000
    40            inc %eax
    83f851        cmp $81, %eax
    75f3          jne 1b
    ff0500500000  incl 0x5000
    ebfe          jmp .
""")
"""Fewer writes than 85: before Linux 6.11, KVM counts its ring as full there when it starts at entry 0."""


def test_port_and_memory_writes_keep_their_common_order(run: MakeRunning) -> None:
    guest, device = run(), Recorder()
    guest.map(device).add_coalescing(0, 4)
    guest.map_ports(device, 1, 0x510).add_coalescing(0, 1)
    guest.start(INTERLEAVE)
    wait_for_the_end(guest)
    assert device.accesses == []
    guest.machine.pause()
    assert device.written == list(range(1, 81))
    assert [access[2] for access in device.accesses] == [1, 4] * 40


WRITE_TO_BOTH = listing("""
    c705001000d002000000  movl $2, 0xd0001000
    c705000000d001000000  movl $1, 0xd0000000
    c705001000d003000000  movl $3, 0xd0001000
    ff0500500000          incl 0x5000
    ebfe                  jmp .
""")


def test_end_of_coalescing_is_that_of_one_region(run: MakeRunning) -> None:  # E5
    guest, one, two = run(), Recorder(), Recorder()
    first = guest.map(one, PAGE_SIZE)
    first.add_coalescing(0, 4)
    first.add_coalescing(8, 4)
    guest.map(two, PAGE_SIZE, DEVICE + PAGE_SIZE).add_coalescing(0, 8)
    first.clear_coalescing()

    guest.start(WRITE_TO_BOTH)
    wait_for_the_end(guest)

    assert (one.written, two.written) == ([1], [2])  # what came before the exit, and nothing after it
    guest.machine.pause()
    assert (one.written, two.written) == ([1], [2, 3])


def test_coalescing_goes_where_its_region_is_seen(run: MakeRunning) -> None:  # E5
    guest, device, other = run(), Recorder(), Recorder()
    region = guest.map(device, PAGE_SIZE, DEVICE + MIB)
    region.add_coalescing(0, 4)
    region.move(DEVICE + PAGE_SIZE)
    guest.map(other, PAGE_SIZE, DEVICE + MIB)
    guest.start(WRITE_TO_BOTH)
    wait_for_the_end(guest)
    assert device.written == [2]
    guest.machine.pause()
    assert device.written == [2, 3]

    region.set_enabled(False)
    guest.run(WRITE_TO_BOTH.removesuffix(b"\xeb\xfe"))
    assert (device.written, other.written) == ([2, 3], [])


class Ending(Recorder):
    """Ends the guest at the second write."""

    def write(self, offset: int, size: int, value: int) -> None:
        super().write(offset, size, value)
        if value == 2:
            raise GuestError("it asked for the end")


def test_device_that_ends_the_guest_late_spares_who_had_the_write_delivered(run: MakeRunning) -> None:
    guest, device = run(), Ending()
    guest.map(device).add_coalescing(0, 4)
    guest.start(WRITE_THREE)
    wait_for_the_end(guest)

    with guest.memory.transaction():
        pass

    assert guest.ended.wait(BOUND)
    assert guest.machine.state is RunState.SHUTDOWN
    assert isinstance(guest.machine.failure, GuestError)
    guest.machine.pause()


def test_device_that_ends_the_guest_while_it_is_paused_is_heard(run: MakeRunning) -> None:
    guest, device = run(), Ending()
    guest.map(device).add_coalescing(0, 4)
    guest.start(WRITE_THREE)
    wait_for_the_end(guest)
    with pytest.raises(GuestError, match="asked for the end"):
        guest.machine.pause()
    assert guest.machine.state is RunState.SHUTDOWN
