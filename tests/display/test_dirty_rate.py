import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support.fake_machine import RAM_PAGES, FakeMachine
from support.streams import fake_machine
from support.waiting import wait_until

from dirtylog.display import DirtyRate, DirtyRateMeter, RateMode, RateStatus, WriteSampler
from dirtylog.display.dirty_rate import choose_pages, counted_rate, sampled_rate
from dirtylog.errors import DirtylogError, KernelError, UsageError
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.memory import Memory, RAMBlock, TrackingReason
from dirtylog.units import KIB, MIB, PAGE_SIZE

DENSE = 16384


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


def block(memory: Memory, size: int, name: str = "ram") -> RAMBlock:
    made = memory.ram(name, size).block
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("size", "per_gib", "count"),
    [
        (64 * KIB, DENSE, None),  # too small a block
        (128 * KIB, DENSE, 2),
        (128 * KIB, 128, 0),
        (64 * MIB, 128, 8),
        (64 * MIB, 512, 32),
        (63 * MIB + 512 * KIB, 512, 31),
    ],
)
def test_blocks_are_sampled_by_their_size(memory: Memory, size: int, per_gib: int, count: int | None) -> None:
    found = choose_pages([block(memory, size)], per_gib, np.random.default_rng(1))
    assert [len(one.numbers) for one in found] == ([] if count is None else [count])


def test_last_page_is_never_drawn_and_all_others_are(memory: Memory) -> None:
    ram = block(memory, 128 * KIB)
    (found,) = choose_pages([ram], DENSE * 1024, np.random.default_rng(1))
    assert set(found.numbers) == set(range(31))


def test_rate_is_the_share_of_samples_that_changed(memory: Memory) -> None:
    ram = block(memory, 64 * MIB)
    before = choose_pages([ram], DENSE, np.random.default_rng(1))
    assert sampled_rate(before, memory.blocks, 1000) == 0
    (chosen,) = before
    assert len(chosen.numbers) == 1024
    changed = sorted(set(chosen.numbers))[:300]
    for number in changed:
        ram.array[number * PAGE_SIZE + 17] = 1
    dirty = sum(number in changed for number in chosen.numbers)
    assert sampled_rate(before, memory.blocks, 1000) == dirty * 64 * 1000 // (1024 * 1000)
    assert sampled_rate(before, memory.blocks, 50) == dirty * 64 * 1000 // (1024 * 50)


def test_page_that_holds_again_what_it_held_counts_as_clean(memory: Memory) -> None:
    ram = block(memory, 64 * MIB)
    before = choose_pages([ram], DENSE, np.random.default_rng(1))
    for value in (1, 0):
        ram.array[::PAGE_SIZE] = value
    assert sampled_rate(before, memory.blocks, 1000) == 0


def test_holes_are_looked_at_without_filling_them(memory: Memory) -> None:
    ram = block(memory, 64 * MIB)
    before = choose_pages([ram], DENSE, np.random.default_rng(1))
    assert sampled_rate(before, memory.blocks, 1000) == 0
    assert isinstance(ram.mapping, MemfdMapping)
    assert list(ram.mapping.extents(0, ram.size)) == []


def test_block_without_samples_counts_with_its_size(memory: Memory) -> None:
    large, small = block(memory, 64 * MIB), block(memory, MIB, "small")
    before = choose_pages([large, small], 512, np.random.default_rng(1))
    assert [len(one.numbers) for one in before] == [32, 0]
    large.array[::PAGE_SIZE] = 1
    assert sampled_rate(before, memory.blocks, 1000) == 65


def test_nothing_to_look_at_gives_no_rate(memory: Memory) -> None:
    ram = block(memory, MIB)
    assert sampled_rate(choose_pages([ram], 512, np.random.default_rng(1)), memory.blocks, 1000) == -1
    assert sampled_rate([], {}, 1000) == -1


def test_block_that_changed_counts_for_nothing(memory: Memory) -> None:
    ram, other = block(memory, 64 * MIB), block(memory, 64 * MIB, "other")
    before = choose_pages([ram, other], 512, np.random.default_rng(1))
    ram.array[::PAGE_SIZE] = 1
    other.array[::PAGE_SIZE] = 1
    assert sampled_rate(before, {"ram": ram}, 1000) == 64
    assert sampled_rate(before, {"ram": other}, 1000) == -1


@pytest.mark.parametrize(
    ("pages", "milliseconds", "rate"),
    [(256, 1000, 1), (255, 1000, 0), (255, 999, 0), (256, 50, 20), (1, 3, 1), (1, 4, 0), (10**9, 60000, 65104)],
)
def test_counted_pages_are_whole_mib_a_second(pages: int, milliseconds: int, rate: int) -> None:
    assert counted_rate(pages, milliseconds) == rate


class Bench:
    """A meter of a machine that is written by hand, right in the midst of each measurement."""

    def __init__(self, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine = machine
        self.meanwhile: Callable[[], object] = lambda: None
        self.meter = DirtyRateMeter(machine, WriteSampler(machine.memory))
        monkeypatch.setattr(self.meter, "_wait", self._wait)

    def _wait(self, seconds: float) -> int:
        self.meanwhile()
        return round(seconds * 1000)

    def measure(self, mode: RateMode, seconds: float = 1.0) -> DirtyRate:
        self.meter.start(mode, seconds)
        wait_until(lambda: self.meter.last.status is RateStatus.MEASURED, "it was measured")
        return self.meter.last

    def logs(self) -> bool:
        return self.machine.memory.is_wanted(TrackingReason.DIRTY_RATE)

    def write(self, first: int, count: int) -> None:
        self.machine.system.write(first * PAGE_SIZE, bytes([1]) * count * PAGE_SIZE)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with fake_machine(boot=False, ram_pages=1024) as machine:
        bench = Bench(machine, monkeypatch)
        yield bench
        bench.meter.close()


def test_nothing_was_measured_at_first(bench: Bench) -> None:
    assert bench.meter.last == DirtyRate()
    assert bench.meter.last.status is RateStatus.UNSTARTED


def test_bitmap_counts_the_pages_written_meanwhile(bench: Bench) -> None:
    bench.write(0, 1000)
    bench.meanwhile = lambda: bench.write(0, 513)
    result = bench.measure(RateMode.DIRTY_BITMAP, 0.5)
    assert (result.rate, result.vcpus, result.error, result.sample_pages) == (4, (), None, 0)
    assert (result.mode, result.seconds) == (RateMode.DIRTY_BITMAP, 0.5)
    assert abs(time.time() - result.began) < 60
    assert not bench.logs()


def test_sampling_sees_what_changed_and_logs_nothing(bench: Bench) -> None:
    def write() -> None:
        assert not bench.logs()
        bench.write(0, 1024)

    bench.meanwhile = write
    bench.meter.start(RateMode.PAGE_SAMPLING, 0.5, DENSE)
    wait_until(lambda: bench.meter.last.status is RateStatus.MEASURED, "it was measured")
    assert (bench.meter.last.rate, bench.meter.last.sample_pages) == (8, DENSE)


def test_rings_tell_vcpus_apart(bench: Bench) -> None:
    def write() -> None:
        assert bench.logs()
        bench.machine.written = [7 + 256, 512, 1]

    bench.machine.can_limit = True
    bench.machine.written = [7, 0, 1]
    bench.meanwhile = write
    result = bench.measure(RateMode.DIRTY_RING)
    assert (result.rate, result.vcpus) == (3, (1, 2, 0))
    assert not bench.logs()


def test_second_measurement_waits_for_the_end_of_the_first(bench: Bench) -> None:
    refused: list[UsageError] = []

    def again() -> None:
        with pytest.raises(UsageError, match="is being measured already") as caught:
            bench.meter.start(RateMode.DIRTY_BITMAP, 1.0)
        refused.append(caught.value)
        assert (bench.meter.last.status, bench.meter.last.rate) == (RateStatus.MEASURING, None)

    bench.meanwhile = again
    for count in (1, 2):
        bench.measure(RateMode.DIRTY_BITMAP)
        assert len(refused) == count
    assert refused[0].remedy


@pytest.mark.parametrize(
    ("mode", "seconds", "samples", "cause"),
    [
        (RateMode.PAGE_SAMPLING, 0.049, None, "cannot be measured in 0.049 s"),
        (RateMode.PAGE_SAMPLING, 60.001, None, "cannot be measured in 60.001 s"),
        (RateMode.PAGE_SAMPLING, float("nan"), None, "cannot be measured in nan s"),
        (RateMode.PAGE_SAMPLING, 1, 127, "127 sample pages"),
        (RateMode.PAGE_SAMPLING, 1, 16385, "16385 sample pages"),
        (RateMode.DIRTY_BITMAP, 1, 512, "mode dirty-bitmap takes no sample pages"),
        (RateMode.DIRTY_RING, 1, None, "does not know which vCPU writes"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    bench: Bench, mode: RateMode, seconds: float, samples: int | None, cause: str
) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        bench.meter.start(mode, seconds, samples)
    assert caught.value.remedy
    assert bench.meter.last.status is RateStatus.UNSTARTED


def test_machine_with_rings_has_no_bitmap(bench: Bench) -> None:
    bench.machine.can_limit = True
    with pytest.raises(UsageError, match="has no dirty bitmap"):
        bench.meter.start(RateMode.DIRTY_BITMAP, 1)


@pytest.mark.parametrize("error", [KernelError("ioctl", 5, "no"), ZeroDivisionError()], ids=["refused", "defect"])
def test_failure_is_told_with_the_result(bench: Bench, error: Exception) -> None:
    def fail() -> None:
        raise error

    bench.meanwhile = fail
    result = bench.measure(RateMode.DIRTY_BITMAP)
    assert result.rate == -1
    assert isinstance(result.error, DirtylogError)
    assert error in (result.error, result.error.__cause__)
    assert not bench.logs()


def test_close_ends_a_measurement_at_once_and_allows_no_other() -> None:
    with fake_machine(ram_pages=RAM_PAGES) as machine:
        meter = DirtyRateMeter(machine, WriteSampler(machine.memory))
        meter.start(RateMode.DIRTY_BITMAP, 60)
        meter.close()
        meter.close()
        assert meter.last.status is RateStatus.MEASURED
        assert [thread.name for thread in threading.enumerate() if thread.name == "dirty-rate"] == []
        with pytest.raises(UsageError, match="any more"):
            meter.start(RateMode.DIRTY_BITMAP, 1)
        assert not machine.memory.is_wanted(TrackingReason.DIRTY_RATE)


def test_time_that_it_took_counts_and_not_the_time_asked_for() -> None:
    with fake_machine() as machine:
        meter = DirtyRateMeter(machine, WriteSampler(machine.memory))
        assert meter._wait(0.05) >= 50
        meter.close()
        assert meter._wait(60) < 60_000
