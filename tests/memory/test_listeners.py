from collections.abc import Callable, Iterator

import pytest
from support.listeners import Follower, Recorder, Told

from dirtylog.errors import HostError, KernelError, UsageError
from dirtylog.memory import (
    Client,
    IOEventFD,
    Memory,
    MemoryListener,
    MemoryRegion,
    MemoryRegionOps,
    MemoryRegionSection,
    TrackingReason,
)
from dirtylog.units import PAGE_SIZE


class Board:
    """RAM that is mapped, a spare region, an alias and a ROM device, and a follower that fails if it hears wrong."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.root = self.memory.container("root")
        self.ram: MemoryRegion = self.memory.ram("ram", PAGE_SIZE)
        self.spare: MemoryRegion = self.memory.ram("spare", PAGE_SIZE)
        self.window = self.memory.alias("window", self.ram, 0, PAGE_SIZE)
        self.device = self.memory.rom_device("device", b"rom", MemoryRegionOps())
        self.root.add(self.ram, 0)
        self.root.add(self.window, 4 * PAGE_SIZE)
        self.root.add(self.device, 8 * PAGE_SIZE)
        self.space = self.memory.address_space("space", self.root)
        self.before = self.listen(0)
        self.after = self.listen(20)

    def listen(self, priority: int) -> Follower:
        follower = Follower(priority)
        self.memory.register(follower, self.space)
        return follower

    def check(self) -> None:
        """All who listen know what there is."""
        self.before.check(self.space)
        self.after.check(self.space)


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.memory.close()


class Failing(MemoryListener):
    """Raises in the callbacks that it is told to fail in, every time."""

    priority = 10

    def __init__(self, *callbacks: str) -> None:
        self.failing = callbacks
        self.failures = 0

    def _told(self, callback: str) -> None:
        if callback in self.failing:
            self.failures += 1
            raise KernelError(callback, 12, f"failure {self.failures}")

    def begin(self) -> None:
        self._told("begin")

    def commit(self) -> None:
        self._told("commit")

    def region_add(self, section: MemoryRegionSection) -> None:
        self._told("region_add")

    def region_del(self, section: MemoryRegionSection) -> None:
        self._told("region_del")

    def region_nop(self, section: MemoryRegionSection) -> None:
        self._told("region_nop")

    def log_start(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        self._told("log_start")

    def log_stop(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        self._told("log_stop")

    def log_sync(self, section: MemoryRegionSection) -> None:
        self._told("log_sync")

    def log_clear(self, section: MemoryRegionSection) -> None:
        self._told("log_clear")

    def log_global_start(self) -> None:
        self._told("log_global_start")

    def log_global_stop(self) -> None:
        self._told("log_global_stop")

    def log_global_after_sync(self) -> None:
        self._told("log_global_after_sync")

    def eventfd_add(self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> None:
        self._told("eventfd_add")

    def eventfd_del(self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> None:
        self._told("eventfd_del")

    def coalesced_io_add(self, section: MemoryRegionSection, address: int, size: int) -> None:
        self._told("coalesced_io_add")

    def coalesced_io_del(self, section: MemoryRegionSection, address: int, size: int) -> None:
        self._told("coalesced_io_del")


def change_everything(board: Board) -> None:
    """One transaction in which ranges go, come and stay, with eventfds and coalesced parts."""
    with board.memory.transaction():
        board.root.remove(board.window)
        board.root.add(board.spare, PAGE_SIZE)
        board.device.add_eventfd(IOEventFD(0, 4, False, 0, 3))
        board.spare.add_coalescing(0, 8)


CALLBACKS = ["begin", "region_del", "region_add", "region_nop", "coalesced_io_add", "eventfd_add", "commit"]


@pytest.mark.parametrize("callback", CALLBACKS)
def test_callback_that_raises_keeps_nobody_from_hearing_and_its_error_surfaces_once(
    board: Board, callback: str
) -> None:  # T11
    failing = Failing()
    board.memory.register(failing, board.space)
    failing.failing = (callback,)

    with pytest.raises(KernelError, match=rf"{callback} failed: failure 1") as caught:
        change_everything(board)

    assert f"raised by Failing.{callback}" in caught.value.__notes__[0]
    board.check()
    assert board.window.container is None
    failing.failing = ()
    board.root.remove(board.spare)
    board.check()


def test_error_of_many_callbacks_is_the_first_with_the_number_of_the_others(board: Board) -> None:  # T11
    failing = Failing()
    board.memory.register(failing, board.space)
    failing.failing = tuple(CALLBACKS)

    with pytest.raises(KernelError, match="begin failed: failure 1") as caught:
        change_everything(board)

    assert any(f"{failing.failures - 1} more callbacks" in note for note in caught.value.__notes__)
    board.check()


def test_error_of_a_nested_change_surfaces_when_the_outermost_transaction_ends(board: Board) -> None:  # T11
    failing = Failing()
    board.memory.register(failing, board.space)
    failing.failing = ("region_add",)
    ended = False

    def change() -> None:
        nonlocal ended
        with board.memory.transaction():
            board.root.add(board.spare, PAGE_SIZE)
            ended = True

    with pytest.raises(KernelError, match="region_add"):
        change()
    assert ended
    board.check()


@pytest.mark.parametrize("callback", ["log_sync", "log_clear", "log_global_after_sync"])
def test_failure_to_collect_or_clear_reaches_who_asked_and_is_forgotten_then(board: Board, callback: str) -> None:
    # T11
    failing = Failing()
    board.memory.register(failing, board.space)
    board.memory.start_logging(TrackingReason.MIGRATION)
    failing.failing = (callback,)

    with pytest.raises(KernelError, match=f"{callback} failed: failure 1"):
        board.ram.snapshot_and_clear_dirty(0, PAGE_SIZE, Client.MIGRATION)

    failing.failing = ()
    board.ram.snapshot_and_clear_dirty(0, PAGE_SIZE, Client.MIGRATION)
    board.root.remove(board.ram)
    board.check()


@pytest.mark.parametrize("callback", ["begin", "region_nop", "log_start", "commit"])
def test_start_of_logging_that_fails_half_way_is_undone_for_all(board: Board, callback: str) -> None:  # T13
    failing = Failing()
    board.memory.register(failing, board.space)
    failing.failing = (callback,)

    with pytest.raises(KernelError, match=f"{callback} failed"):
        board.memory.start_logging(TrackingReason.MIGRATION)

    assert not board.memory.tracking
    board.check()
    failing.failing = ()
    board.memory.start_logging(TrackingReason.MIGRATION)
    board.check()


@pytest.mark.parametrize("callback", ["log_stop", "commit", "log_global_stop"])
def test_stop_of_logging_that_fails_still_reaches_everybody(board: Board, callback: str) -> None:  # T11 T6
    failing = Failing()
    board.memory.register(failing, board.space)
    board.memory.start_logging(TrackingReason.MIGRATION)
    failing.failing = (callback,)

    with pytest.raises(KernelError, match=f"{callback} failed: failure 1"):
        board.memory.stop_logging(TrackingReason.MIGRATION)

    board.check()
    failing.failing = ()
    board.memory.start_logging(TrackingReason.MIGRATION)
    board.check()


def test_stop_that_fails_while_a_start_is_undone_leaves_nothing_for_later(board: Board) -> None:  # T11 T13
    class Unable(MemoryListener):
        priority = 15

        def log_global_start(self) -> None:
            raise HostError("no memory for the log")

    board.memory.register(Failing("log_global_stop"), board.space)
    board.memory.register(Unable(), board.space)

    with pytest.raises(HostError, match="no memory for the log") as caught:
        board.memory.start_logging(TrackingReason.MIGRATION)

    assert any("1 more callbacks" in note for note in caught.value.__notes__)
    board.root.remove(board.ram)
    board.check()


@pytest.mark.parametrize(
    "callback",
    ["begin", "log_global_start", "region_add", "coalesced_io_add", "log_start", "eventfd_add", "commit"],
)
def test_listener_that_cannot_join_is_told_that_all_is_gone_and_is_not_registered(board: Board, callback: str) -> None:
    # T13
    class Joining(Recorder):
        def tell(self, callback_: str, *args: object) -> None:
            super().tell(callback_)
            if callback_ == callback:
                raise KernelError(callback_, 12, "out of slots")

        def eventfd_add(self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> None:
            self.tell("eventfd_add")

        def eventfd_del(self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> None:
            self.tell("eventfd_del")

        def coalesced_io_add(self, section: MemoryRegionSection, address: int, size: int) -> None:
            self.tell("coalesced_io_add")

        def coalesced_io_del(self, section: MemoryRegionSection, address: int, size: int) -> None:
            self.tell("coalesced_io_del")

    board.memory.start_logging(TrackingReason.MIGRATION)
    change_everything(board)
    log: list[Told] = []
    joining = Joining(log)

    with pytest.raises(KernelError, match=f"{callback} failed: out of slots"):
        board.memory.register(joining, board.space)

    told = [entry.callback for entry in log]
    for start, end in [("region_add", "region_del"), ("log_start", "log_stop"), ("eventfd_add", "eventfd_del")]:
        assert told.count(start) == told.count(end) > 0
    log.clear()
    board.root.remove(board.spare)
    board.memory.unregister(joining)
    assert log == []
    board.check()


EDITS: list[tuple[str, Callable[[Board], object]]] = [
    ("transaction", lambda board: board.memory.transaction().__enter__()),
    ("add", lambda board: board.root.add(board.memory.container("fresh"), 0)),
    ("remove", lambda board: board.root.remove(board.ram)),
    ("move", lambda board: board.ram.move(PAGE_SIZE)),
    ("enable", lambda board: board.ram.set_enabled(False)),
    ("readonly", lambda board: board.ram.set_readonly(True)),
    ("resize", lambda board: board.window.set_size(1)),
    ("alias offset", lambda board: board.window.set_target_offset(5)),
    ("trap", lambda board: board.device.set_trapped(True)),
    ("eventfd", lambda board: board.device.add_eventfd(IOEventFD(0, 4, False, 0, 9))),
    ("coalescing", lambda board: board.device.add_coalescing(0, 4)),
    ("clear coalescing", lambda board: board.device.clear_coalescing()),
    ("display", lambda board: board.ram.start_logging_display()),
    ("code client", lambda board: board.memory.set_code_client(True)),
    ("start logging", lambda board: board.memory.start_logging(TrackingReason.DIRTY_RATE)),
    ("stop logging", lambda board: board.memory.stop_logging(TrackingReason.MIGRATION)),
    ("register", lambda board: board.memory.register(MemoryListener(), board.space)),
    ("unregister", lambda board: board.memory.unregister(board.before)),
    ("address space", lambda board: board.memory.address_space("more", board.root)),
    ("remove address space", lambda board: board.memory.remove_address_space(board.space)),
]
TOLD = [*CALLBACKS, "log_global_start", "log_start", "log_sync", "log_clear", "log_global_after_sync"]
TOLD += ["log_stop", "log_global_stop", "eventfd_del", "coalesced_io_del"]


@pytest.mark.parametrize("edit", [edit for _, edit in EDITS], ids=[name for name, _ in EDITS])
def test_change_from_inside_any_callback_is_refused_and_changes_nothing(
    board: Board, edit: Callable[[Board], object]
) -> None:  # T10
    class Meddling(Failing):
        def __init__(self) -> None:
            super().__init__()
            self.refused: set[str] = set()
            self.meddles = False

        def _told(self, callback: str) -> None:
            if self.meddles:
                with pytest.raises(UsageError, match="cannot be changed from inside a listener's callback"):
                    edit(board)
                self.refused.add(callback)

    meddling = Meddling()
    board.memory.register(meddling, board.space)
    meddling.meddles = True
    change_everything(board)
    board.memory.start_logging(TrackingReason.MIGRATION)
    board.device.snapshot_and_clear_dirty(0, PAGE_SIZE, Client.MIGRATION)
    board.memory.stop_logging(TrackingReason.MIGRATION)
    board.device.remove_eventfd(IOEventFD(0, 4, False, 0, 3))
    board.spare.clear_coalescing()

    assert meddling.refused == set(TOLD)
    board.check()
    assert [flat.region.name for flat in board.space.view.ranges] == ["ram", "spare", "device"]
    assert not board.device.eventfds


def test_change_from_inside_a_callback_surfaces_as_the_callbacks_error(board: Board) -> None:  # T10 T11
    class Meddler(MemoryListener):
        def commit(self) -> None:
            if board.spare.container is None:
                board.root.add(board.spare, 16 * PAGE_SIZE)

    with pytest.raises(UsageError, match="from inside a listener's callback"):
        board.memory.register(Meddler(), board.space)

    assert board.spare.container is None
    board.root.add(board.spare, 16 * PAGE_SIZE)
    board.check()
