import threading

import pytest
from support.running import COUNTER, MakeRunning, Recorder, Running, count_exits, listing
from support.waiting import BOUND, Task, wait_until

from dirtylog.errors import HostError
from dirtylog.machine import RunState
from dirtylog.machine.kvm import gate as gate_module
from dirtylog.machine.kvm.gate import RunGate
from dirtylog.memory import MemoryRegion, TrackingReason
from dirtylog.units import PAGE_SIZE


def no_kick() -> None:
    pass


def test_closed_gate_waits_for_those_inside() -> None:
    gate, leave, inside, closed = RunGate(), threading.Event(), threading.Event(), threading.Event()

    def visit() -> None:
        with gate:
            inside.set()
            assert leave.wait(BOUND)
            assert not closed.is_set()

    def close() -> None:
        with gate.closed(leave.set):
            closed.set()

    visitor = Task(visit)
    assert inside.wait(BOUND)
    closer = Task(close)
    visitor.join()
    closer.join()
    assert closed.is_set()


def test_closed_gate_lets_nobody_in_until_the_last_has_opened_it() -> None:
    gate, entered = RunGate(), threading.Event()

    def visit() -> None:
        with gate:
            entered.set()

    with gate.closed(no_kick):
        with gate.closed(no_kick):
            visitor = Task(visit)
        assert not entered.is_set()
    assert entered.wait(BOUND)
    visitor.join()


def test_gate_opens_when_what_it_was_closed_for_fails() -> None:
    gate = RunGate()
    with pytest.raises(ZeroDivisionError), gate.closed(no_kick):
        raise ZeroDivisionError
    with gate:
        pass


def test_vcpu_that_does_not_leave_is_reported_and_the_gate_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "_TIMEOUT", 0.01)
    gate = RunGate()
    with gate:
        with pytest.raises(HostError, match="did not leave the guest"), gate.closed(no_kick):
            pytest.fail("closed with a vCPU inside")
        with gate:
            pass


PLACE = 0x80_0000
CONTENT = b"\xa5\x5a\xa5\x5a"
HAMMER = listing("""
    813d00008000a55aa55a  1: cmpl $0x5aa55aa5, 0x800000
    7514                  jne 2f
    813d00108000a55aa55a  cmpl $0x5aa55aa5, 0x801000
    7508                  jne 2f
    ff0500500000          incl 0x5000
    ebe0                  jmp 1b
    0f0b                  2: ud2
""")


def twins(guest: Running) -> list[MemoryRegion]:
    """Two regions of four pages with equal contents."""
    made = [guest.memory.ram(name, 4 * PAGE_SIZE) for name in ("one", "two")]
    for region in made:
        assert region.block is not None
        for page in range(4):
            region.block.memory[page * PAGE_SIZE :][:4] = CONTENT
    return made


@pytest.mark.parametrize("logged", [False, True], ids=["plain", "logged"])
def test_guest_never_sees_the_gap_while_memory_is_replaced(
    run: MakeRunning, monkeypatch: pytest.MonkeyPatch, logged: bool
) -> None:
    guest, exits = run(), count_exits(monkeypatch)
    shown, hidden = twins(guest)
    guest.root.add(shown, PLACE)
    guest.start(HAMMER)
    if logged:
        guest.memory.start_logging(TrackingReason.MIGRATION)

    for _ in range(100):
        with guest.memory.transaction():
            guest.root.remove(shown)
            guest.root.add(hidden, PLACE)
        shown, hidden = hidden, shown
        guest.wait_until_counted()

    assert guest.machine.state is RunState.RUNNING
    assert exits == []


def test_guest_never_sees_the_gap_while_its_range_is_cut_and_joined(
    run: MakeRunning, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, exits = run(), count_exits(monkeypatch)
    under, over = twins(guest)
    guest.root.add(under, PLACE)
    piece = guest.memory.alias("piece", over, 0, PAGE_SIZE)
    guest.start(HAMMER)
    for turn in range(100):
        if turn % 2:
            guest.root.remove(piece)
        else:
            guest.root.add(piece, PLACE + turn % 4 * PAGE_SIZE, priority=1)
        under.set_readonly(turn % 4 < 2)
        guest.wait_until_counted()
    assert guest.machine.state is RunState.RUNNING
    assert exits == []


COUNT_AND_RETURN = listing("""
    ff0500500000  incl 0x5000
    c3            ret
""")
CALL_FOR_EVER = listing("""
    b800008000  mov $0x800000, %eax
    ffd0        1: call *%eax
    ebfc        jmp 1b
""")


def test_guest_runs_on_in_memory_that_is_replaced(run: MakeRunning) -> None:
    guest = run()
    shown, hidden = twins(guest)
    for region in (shown, hidden):
        assert region.block is not None
        region.block.memory[: len(COUNT_AND_RETURN)] = COUNT_AND_RETURN
    guest.root.add(shown, PLACE)
    guest.start(CALL_FOR_EVER)
    for _ in range(100):
        with guest.memory.transaction():
            guest.root.remove(shown)
            guest.root.add(hidden, PLACE)
        shown, hidden = hidden, shown
        guest.wait_until_counted()
    assert guest.machine.state is RunState.RUNNING


def test_halted_vcpu_does_not_hinder_a_replacement(run: MakeRunning) -> None:
    guest = run(cpus=2)  # the second one waits to be started
    shown, hidden = twins(guest)
    guest.root.add(shown, PLACE)
    guest.start(HALT)
    wait_until(lambda: guest.word(COUNTER), "the guest was about to halt")
    with guest.memory.transaction():
        guest.root.remove(shown)
        guest.root.add(hidden, PLACE)
    guest.machine.pause()
    assert guest.machine.state is RunState.PAUSED


HALT = listing("""
    ff0500500000  incl 0x5000
    fa            cli
    f4            hlt
""")

SHADOW = {0: 0xC_0000, 1: 0xD_0000}
"""Per vCPU the page where it has ROM shown, or RAM, by a register at port 0x510 or 0x511."""
COUNTERS = (COUNTER, COUNTER + 8)
FLIP_SHADOW = listing("""
    c7050003e0fe00450c00  movl $0xc4500, 0xfee00300
    c7050003e0fe06460c00  movl $0xc4606, 0xfee00300
    ba10050000            mov $0x510, %edx
    b000                  1: mov $0, %al
    ee                    out %al, %dx
    803d00000c0022        cmpb $0x22, 0xc0000
    7519                  jne 2f
    b001                  mov $1, %al
    ee                    out %al, %dx
    803d00000c0011        cmpb $0x11, 0xc0000
    750d                  jne 2f
    a3000000d0            mov %eax, 0xd0000000
    ff0500500000          incl 0x5000
    ebdb                  jmp 1b
    0f0b                  2: ud2
""")
FLIP_SHADOW_16 = listing("""
    b800d0        mov $0xd000, %ax
    8ec0          mov %ax, %es
    ba1105        mov $0x511, %dx
    b000          1: mov $0, %al
    ee            out %al, %dx
    26803e000022  cmpb $0x22, %es:0
    7512          jne 2f
    b001          mov $1, %al
    ee            out %al, %dx
    26803e000011  cmpb $0x11, %es:0
    7507          jne 2f
    66ff060850    incl 0x5008
    ebe3          jmp 1b
    b001          2: mov $1, %al
    e692          out %al, $0x92
""")
"""What a started vCPU runs, in real mode; the first program sends it INIT and a start at 0x6000."""


class Shadow(Recorder):
    """A register like those that PCs had to copy their BIOS: 1 shows RAM, 0 the ROM above it."""

    def __init__(self, rom: MemoryRegion) -> None:
        super().__init__()
        self._rom = rom

    def write(self, offset: int, size: int, value: int) -> None:
        self._rom.set_enabled(not value)


def test_devices_change_what_is_mapped_while_two_vcpus_and_the_host_do_too(run: MakeRunning) -> None:  # E7
    guest = run(cpus=2)
    for cpu, address in SHADOW.items():
        guest.system.write(address, b"\x11")
        rom = guest.memory.rom(f"rom{cpu}", b"\x22")
        guest.root.add(rom, address, priority=1)
        guest.map_ports(Shadow(rom), 1, 0x510 + cpu)
    guest.map(Recorder()).add_coalescing(0, 4)
    guest.system.write(0x6000, FLIP_SHADOW_16)
    moved = guest.memory.ram("moved", PAGE_SIZE)
    guest.root.add(moved, PLACE)
    guest.start(FLIP_SHADOW)

    def go_on() -> None:
        """Return once both vCPUs have flipped what they see once more."""
        for counter in COUNTERS:
            guest.wait_until_counted(counter=counter)

    for turn in range(30):
        moved.move(PLACE + turn % 2 * PAGE_SIZE)
        guest.memory.start_logging(TrackingReason.MIGRATION)
        guest.harvest()
        guest.memory.stop_logging(TrackingReason.MIGRATION)
        go_on()

    guest.machine.pause()
    assert guest.machine.state is RunState.PAUSED
    guest.machine.resume()
    go_on()
