from collections.abc import Iterator

import pytest

from dirtylog.errors import UsageError
from dirtylog.memory import AddressSpace, Client, Memory, MemoryRegion, TrackingReason
from dirtylog.units import PAGE_SIZE


class Board:
    """Two RAM regions that touch at page 2, and a window on the second at page 8."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.low: MemoryRegion = self.memory.ram("low", 2 * PAGE_SIZE)
        self.high: MemoryRegion = self.memory.ram("high", 2 * PAGE_SIZE)
        root = self.memory.container("root")
        root.add(self.low, 0)
        root.add(self.high, 2 * PAGE_SIZE)
        root.add(self.memory.alias("window", self.high, PAGE_SIZE, PAGE_SIZE), 8 * PAGE_SIZE)
        self.space: AddressSpace = self.memory.address_space("space", root)

    def dirty(self, region: MemoryRegion, client: Client = Client.MIGRATION) -> list[bool]:
        return [region.is_dirty(page * PAGE_SIZE, PAGE_SIZE, client) for page in range(2)]

    def clean(self) -> None:
        for region in (self.low, self.high):
            for client in Client:
                region.test_and_clear_dirty(0, region.size, client)


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.memory.close()


def test_bytes_written_across_regions_are_read_back(board: Board) -> None:
    data = bytes(range(100))
    board.space.write(2 * PAGE_SIZE - 50, data)

    assert board.space.read(2 * PAGE_SIZE - 50, 100) == data
    assert board.low.block is not None
    assert board.low.block.array[-50:].tobytes() == data[:50]


def test_alias_reads_and_writes_its_target(board: Board) -> None:
    board.space.write(8 * PAGE_SIZE, b"here")

    assert board.space.read(3 * PAGE_SIZE, 4) == b"here"


def test_nothing_is_read_or_written_where_no_bytes_are_asked_for(board: Board) -> None:
    assert board.space.read(1 << 40, 0) == b""
    board.space.write(1 << 40, b"")


@pytest.mark.parametrize(
    ("address", "size"), [(4 * PAGE_SIZE, 1), (4 * PAGE_SIZE - 1, 2), (7 * PAGE_SIZE, 2 * PAGE_SIZE)]
)
def test_access_where_nothing_answers_is_refused_whole(board: Board, address: int, size: int) -> None:
    with pytest.raises(UsageError, match=r"nothing answers at 0x[47]000 of space"):
        board.space.read(address, size)
    with pytest.raises(UsageError, match="nothing answers"):
        board.space.write(address, b"x" * size)
    assert board.space.read(0, 4 * PAGE_SIZE) == bytes(4 * PAGE_SIZE)


def test_host_write_is_marked_for_those_who_log_in_every_page_it_touches(board: Board) -> None:  # D12 D10
    board.memory.start_logging(TrackingReason.MIGRATION)
    board.clean()

    board.space.write(2 * PAGE_SIZE - 1, b"xy")

    assert board.dirty(board.low) == [False, True]
    assert board.dirty(board.high) == [True, False]
    assert board.dirty(board.low, Client.DISPLAY) == [False, False]


def test_host_write_is_marked_for_nobody_when_nobody_logs(board: Board) -> None:  # D12
    board.clean()
    board.space.write(0, b"x")

    assert not any(board.dirty(board.low, client)[0] for client in Client)


def test_host_write_is_marked_after_the_bytes_are_in_place(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    # D12
    at_the_mark: list[bytes] = []
    monkeypatch.setattr(
        MemoryRegion, "set_dirty", lambda region, offset, size: at_the_mark.append(board.space.read(0, 3))
    )
    board.space.write(0, b"now")

    assert at_the_mark == [b"now"]


def test_view_follows_the_tree_only_when_the_transaction_ends(board: Board) -> None:  # T1
    with board.memory.transaction():
        board.space.root.remove(board.low)
        assert board.space.read(0, 1) == b"\0"
        assert board.space.render().lookup(0) is None
    with pytest.raises(UsageError, match="nothing answers"):
        board.space.read(0, 1)
