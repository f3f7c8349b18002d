from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.model_tracker import ModelTracker

from dirtylog.errors import HostError, KernelError
from dirtylog.memory import Client, Memory, MemoryRegionSection, TrackingReason, Words
from dirtylog.trackers import KVMLogMode, Tracker, tracker_listener
from dirtylog.units import PAGE_SIZE

PAGES = 70
SIZE = PAGES * PAGE_SIZE


class Refusing(ModelTracker):
    """Refuses the calls that its bench lists, before anything is done."""

    def __init__(self, mode: KVMLogMode, pages: int, refused: set[str]) -> None:
        super().__init__(mode, pages)
        self._refused = refused

    def arm(self) -> None:
        self._check("arm")
        super().arm()

    def collect(self, words: Words) -> None:
        self._check("collect")
        super().collect(words)

    def _check(self, call: str) -> None:
        if call in self._refused:
            raise KernelError(call, 12, "no memory")


class Bench:
    """RAM at 0, and a listener whose trackers and hold fail where ``refused`` says so."""

    def __init__(self, mode: KVMLogMode) -> None:
        self.mode = mode
        self.refused: set[str] = set()
        self.trackers: dict[int, Refusing] = {}
        self.memory = Memory()
        self.ram = self.memory.ram("ram", SIZE)
        self.root = self.memory.container("root")
        self.root.add(self.ram, 0)
        self.space = self.memory.address_space("space", self.root)
        self.listener = tracker_listener(
            self._attach, self._detach, self._hold, clears_on_collect=mode.clears_on_collect
        )
        self.memory.register(self.listener, self.space)

    def start(self) -> None:
        """Log, from a clean state."""
        self.memory.start_logging(TrackingReason.MIGRATION)
        self.memory.sync_dirty_log()
        self.ram.test_and_clear_dirty(0, SIZE, Client.MIGRATION)

    def dirty(self) -> list[int]:
        return [page for page in range(PAGES) if self.ram.is_dirty(page * PAGE_SIZE, PAGE_SIZE, Client.MIGRATION)]

    def _attach(self, section: MemoryRegionSection) -> Refusing:
        assert section.offset_within_address_space not in self.trackers
        tracker = Refusing(self.mode, section.size // PAGE_SIZE, self.refused)
        self.trackers[section.offset_within_address_space] = tracker
        return tracker

    def _detach(self, tracker: Tracker) -> None:
        assert isinstance(tracker, Refusing)
        assert not tracker.armed
        self.trackers = {start: known for start, known in self.trackers.items() if known is not tracker}

    @contextmanager
    def _hold(self) -> Iterator[None]:
        if "hold" in self.refused:
            raise HostError("a vCPU did not leave the guest")
        yield


@pytest.fixture(params=KVMLogMode)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.refused.clear()
    bench.memory.unregister(bench.listener)
    assert bench.trackers == {}
    bench.memory.close()


def test_range_moves_though_writers_could_not_be_held(bench: Bench) -> None:  # T11
    bench.refused.add("hold")
    with pytest.raises(HostError, match="did not leave"):
        bench.ram.move(PAGE_SIZE)

    assert [flat.start for flat in bench.space.view.ranges] == [PAGE_SIZE]
    assert list(bench.trackers) == [PAGE_SIZE]

    bench.refused.clear()
    bench.ram.move(2 * PAGE_SIZE)
    assert list(bench.trackers) == [2 * PAGE_SIZE]


def test_logged_range_is_collected_though_writers_could_not_be_held(bench: Bench) -> None:  # D6 T11
    bench.start()
    bench.trackers[0].write(3)
    bench.refused.add("hold")
    with pytest.raises(HostError, match="did not leave"):
        bench.root.remove(bench.ram)

    assert bench.trackers == {}
    assert bench.dirty() == [3]


def test_error_of_the_hold_is_raised_before_those_of_the_sections(bench: Bench) -> None:  # T11
    bench.start()
    bench.refused |= {"hold", "collect"}
    with pytest.raises(HostError, match="did not leave"):
        bench.root.remove(bench.ram)

    assert bench.trackers == {}
    assert bench.dirty() == list(range(PAGES))


def test_range_whose_last_collect_fails_leaves_every_page_dirty(bench: Bench) -> None:  # D1 D6
    bench.start()
    bench.refused.add("collect")
    with pytest.raises(KernelError, match="collect failed"):
        bench.root.remove(bench.ram)

    assert bench.dirty() == list(range(PAGES))


def test_range_that_could_not_be_armed_is_dirty_at_each_sync(bench: Bench) -> None:  # D1 T11
    bench.root.remove(bench.ram)
    bench.memory.start_logging(TrackingReason.MIGRATION)
    bench.refused.add("arm")
    with pytest.raises(KernelError, match="arm failed"):
        bench.root.add(bench.ram, 0)

    assert not bench.trackers[0].armed
    for _ in range(2):
        bench.ram.test_and_clear_dirty(0, SIZE, Client.MIGRATION)
        assert bench.dirty() == []
        bench.memory.sync_dirty_log()
        assert bench.dirty() == list(range(PAGES))


def test_range_that_could_not_be_armed_reports_nothing_once_nobody_logs(bench: Bench) -> None:
    bench.root.remove(bench.ram)
    bench.memory.start_logging(TrackingReason.MIGRATION)
    bench.refused.add("arm")
    with pytest.raises(KernelError, match="arm failed"):
        bench.root.add(bench.ram, 0)
    bench.memory.stop_logging(TrackingReason.MIGRATION)
    bench.refused.clear()

    bench.start()
    bench.trackers[0].write(5)
    bench.memory.sync_dirty_log()
    assert bench.dirty() == [5]
