import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Final

import numpy as np
import pytest
from support.closed_form import distinct_pages
from support.model_tracker import ModelWorld
from support.oracles import to_bits
from support.waiting import Task, wait_until

from dirtylog.display import Sample, Watcher, WriteSampler
from dirtylog.errors import ClosedError, KernelError, UsageError
from dirtylog.guests import random_writer
from dirtylog.machine import KVMMachine, boot_sector
from dirtylog.machine.pc import RAM_NAME
from dirtylog.memory import ClearChunks, Client, PageBitmap, TrackingReason
from dirtylog.trackers import KVMLogMode
from dirtylog.units import MIB, PAGE_SIZE

PAGES: Final = 200
MODES: Final = [KVMLogMode.LEGACY, KVMLogMode.MANUAL, KVMLogMode.INITIALLY_SET]


class Watched:
    """A model's guest and a sampler of its memory."""

    def __init__(self, mode: KVMLogMode) -> None:
        self.world = ModelWorld(mode, PAGES)
        self.world.root.add(self.world.ram, 0)
        self.memory = self.world.memory
        self.sampler = WriteSampler(self.memory)

    def write(self, *pages: int) -> None:
        self.world.write([page * PAGE_SIZE for page in pages])

    def logs(self) -> bool:
        return self.world.trackers[0][1].armed


@pytest.fixture(params=MODES, ids=lambda mode: mode.value)
def watched(request: pytest.FixtureRequest) -> Iterator[Watched]:
    watched = Watched(request.param)
    yield watched
    watched.world.close()


def pages_of(sample: Sample) -> set[int]:
    return to_bits(sample.written["ram"].words)


def test_each_sample_has_the_pages_written_since_the_last(watched: Watched) -> None:
    watched.write(1, 2)
    with watched.sampler.watch() as watcher:
        assert watcher.blocks == {"ram": PAGES}
        watched.write(2, 64, 199)
        assert pages_of(watcher.sample()) == {2, 64, 199}
        assert pages_of(watcher.sample()) == set()
        watched.write(64)
        assert pages_of(watcher.sample()) == {64}


def test_times_are_the_intervals_and_their_sum(watched: Watched) -> None:
    with watched.sampler.watch() as watcher:
        samples = [watcher.sample() for _ in range(4)]
    assert all(sample.seconds > 0 for sample in samples)
    assert samples[0].time == samples[0].seconds
    for before, after in pairwise(samples):
        assert after.time - before.time == pytest.approx(after.seconds)


def test_several_watchers_have_intervals_of_their_own(watched: Watched) -> None:
    with watched.sampler.watch() as often:
        watched.write(1)
        with watched.sampler.watch() as seldom:
            assert pages_of(often.sample()) == {1}
            watched.write(2)
            assert pages_of(often.sample()) == {2}
            watched.write(3)
            assert pages_of(seldom.sample()) == {2, 3}
            assert pages_of(often.sample()) == {3}
        watched.write(4)
        assert pages_of(often.sample()) == {4}


def test_memory_is_logged_from_the_first_watcher_to_the_last(watched: Watched) -> None:
    assert not watched.logs()
    first = watched.sampler.watch()
    second = watched.sampler.watch()
    assert watched.memory.tracking == TrackingReason.DIRTY_RATE
    first.close()
    first.close()
    assert watched.logs()
    second.close()
    assert not watched.logs()
    assert not watched.memory.tracking


def test_watch_can_be_begun_again_and_knows_nothing_of_the_time_between(watched: Watched) -> None:
    watched.sampler.watch().close()
    watched.write(5)
    with watched.sampler.watch() as watcher:
        watched.write(6)
        assert pages_of(watcher.sample()) == {6}


def test_watch_of_a_machine_that_stands_still_ends_when_it_runs_again(watched: Watched) -> None:  # T12
    watcher = watched.sampler.watch()
    watched.memory.set_running(False)
    watcher.close()
    with watched.sampler.watch() as again:
        assert pages_of(again.sample()) == set()
    watched.memory.set_running(True)
    assert not watched.logs()


def test_closed_watch_has_no_samples(watched: Watched) -> None:
    watcher = watched.sampler.watch()
    watcher.close()
    with pytest.raises(ClosedError):
        watcher.sample()


def test_second_sampler_of_a_memory_is_refused(watched: Watched) -> None:
    with watched.sampler.watch() as watcher:
        with pytest.raises(UsageError, match="another sampler"):
            WriteSampler(watched.memory).watch()
        watched.write(1)
        assert pages_of(watcher.sample()) == {1}


def test_block_that_comes_later_is_not_told_of(watched: Watched) -> None:
    with watched.sampler.watch() as watcher:
        watched.memory.ram("late", PAGE_SIZE)
        assert watcher.sample().written.keys() == {"ram"}
        with watched.sampler.watch() as later:
            assert later.blocks == {"ram": PAGES, "late": 1}
            assert later.sample().pages == 0


def test_failed_clear_loses_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(KVMLogMode.MANUAL)
    with watched.sampler.watch() as watcher:
        watched.write(7)
        with monkeypatch.context() as patch:
            patch.setattr(watched.memory, "clear_dirty_bitmap", _fail)
            with pytest.raises(KernelError):
                watcher.sample()
        watched.write(8)
        assert pages_of(watcher.sample()) == {7, 8}
    watched.world.close()


def test_watch_that_cannot_begin_leaves_no_logging_on(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(KVMLogMode.MANUAL)
    with monkeypatch.context() as patch:
        patch.setattr(watched.memory, "clear_dirty_bitmap", _fail)
        with pytest.raises(KernelError):
            watched.sampler.watch()
    assert not watched.logs()
    watched.world.close()


def _fail(*_: object) -> None:
    raise KernelError("ioctl(KVM_CLEAR_DIRTY_LOG)", 22, "Invalid argument")


class MigrationClient:
    """What a migration does to the log: logs, syncs, harvests, clears a chunk before its pages are read."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.to_send = PageBitmap(PAGES)
        self.chunks = ClearChunks(PAGES, 1)
        watched.memory.start_logging(TrackingReason.MIGRATION)
        self.sync()
        self.send()

    def sync(self) -> None:
        self.watched.memory.sync_dirty_log()
        self.watched.world.ram.harvest_dirty(self.to_send, self.chunks)

    def send(self) -> set[int]:
        """Clear, forget, and read; what would be sent."""
        for first, count in self.chunks.take(0, PAGES):
            self.watched.world.ram.clear_dirty_bitmap(first * PAGE_SIZE, count * PAGE_SIZE)
        return to_bits(self.to_send.fetch_and_clear())


def test_migration_and_watch_both_have_every_page(watched: Watched) -> None:  # D4
    migration = MigrationClient(watched)
    with watched.sampler.watch() as watcher:
        watched.write(1, 70)
        assert {1, 70} <= pages_of(watcher.sample())
        watched.write(2)
        migration.sync()
        assert {1, 2, 70} <= migration.send()
        assert pages_of(watcher.sample()) == {2}

        watched.write(3)
        migration.sync()
        watched.write(4)
        assert pages_of(watcher.sample()) == {3, 4}
        assert 3 in migration.send()
        migration.sync()
        assert 4 in migration.send()


def test_migration_that_joins_and_leaves_costs_the_watch_nothing(watched: Watched) -> None:  # D4
    with watched.sampler.watch() as watcher:
        watched.write(1)
        migration = MigrationClient(watched)
        watched.write(2)
        migration.sync()
        watched.memory.stop_logging(TrackingReason.MIGRATION)
        watched.write(3)
        assert pages_of(watcher.sample()) == {1, 2, 3}
        assert watched.world.ram.logging == Client.WATCH


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_no_page_is_lost_whoever_samples_and_migrates_meanwhile(mode: KVMLogMode) -> None:  # D1, D4
    watched = Watched(mode)
    block = watched.world.ram.block
    assert block is not None
    copy = np.zeros(PAGES, np.uint8)
    start = threading.Barrier(4)
    writing = threading.Event()
    writing.set()
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    migration = MigrationClient(watched)
    watchers = [watched.sampler.watch() for _ in seen]

    def write() -> None:
        start.wait()
        for page in np.random.default_rng(3).integers(0, PAGES - 10, 3000).tolist():
            watched.write(page)
        writing.clear()

    def migrate() -> None:
        start.wait()
        while writing.is_set():
            migration.sync()
            for page in migration.send():
                copy[page] = block.array[page * PAGE_SIZE]

    def watch(number: int, watcher: Watcher) -> Callable[[], None]:
        def run() -> None:
            start.wait()
            while writing.is_set():
                seen[number] |= pages_of(watcher.sample())

        return run

    copy[:] = block.array[::PAGE_SIZE]
    tasks = [Task(write), Task(migrate), *(Task(watch(number, one)) for number, one in enumerate(watchers))]
    for task in tasks:
        task.join()
    migration.sync()
    for page in migration.send():
        copy[page] = block.array[page * PAGE_SIZE]

    assert (copy == block.array[::PAGE_SIZE]).all()
    written = set(np.flatnonzero(block.array[::PAGE_SIZE]).tolist())
    assert len(written) > PAGES // 2
    for number, watcher in enumerate(watchers):
        seen[number] |= pages_of(watcher.sample())
        assert written <= seen[number]
        watcher.close()
    watched.world.close()


class RandomWriter:
    """The random writer on real KVM, and the number of its writes at any moment."""

    FIRST, LAST = 1 * MIB, 17 * MIB
    PAGES = (LAST - FIRST) // PAGE_SIZE

    def __init__(self) -> None:
        self.machine = KVMMachine(24 * MIB)
        boot_sector(self.machine, random_writer.build(self.FIRST, self.LAST))
        self.machine.resume()
        self.wait_for(1)

    def writes(self) -> int:
        return int.from_bytes(self.machine.system.read(random_writer.COUNTER_ADDRESS, 8), "little")

    def wait_for(self, more: int) -> None:
        wanted = self.writes() + more
        wait_until(lambda: self.writes() >= wanted, "the guest wrote on")

    def pages(self, first: int, end: int) -> set[int]:
        """The pages that some of the writes go to."""
        return set(random_writer.page_numbers(self.PAGES, first, max(0, end - first)).tolist())


@pytest.fixture
def random_guest(kvm: object) -> Iterator[RandomWriter]:
    guest = RandomWriter()
    yield guest
    guest.machine.close()


@pytest.mark.parametrize("more", [PAGES, RandomWriter.PAGES // 2, 2 * RandomWriter.PAGES])
def test_sample_of_a_random_writer_has_its_pages_and_follows_the_closed_form(
    random_guest: RandomWriter, more: int
) -> None:
    guest = random_guest
    first_page = guest.FIRST // PAGE_SIZE
    # A write may be made and not counted yet: number n when the counter says n.
    earliest = guest.writes()
    watcher = WriteSampler(guest.machine.memory).watch()
    latest = guest.writes() + 1
    for _ in range(4):
        guest.wait_for(more)
        before = guest.writes()
        sample = watcher.sample()
        after = guest.writes() + 1
        bitmap = sample.written[RAM_NAME]
        found = {page - first_page for page in bitmap.indices(first_page, guest.PAGES).tolist()}
        assert guest.pages(latest, before) <= found <= guest.pages(earliest, after)
        least = distinct_pages(guest.PAGES, before - latest)
        most = distinct_pages(guest.PAGES, after - earliest)
        assert least.mean - 6 * least.deviation <= len(found) <= most.mean + 6 * most.deviation
        earliest, latest = before, after
