"""The follower must notice what it is there to notice, or the tests that lean on it prove nothing."""

from collections.abc import Callable, Iterator

import pytest
from support.listeners import NONE, Follower

from dirtylog.memory import AddressSpace, Client, Memory, MemoryRegion, MemoryRegionSection
from dirtylog.units import PAGE_SIZE


class Script:
    """Tells a follower what a test says, of one region."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.ram: MemoryRegion = self.memory.ram("ram", 4 * PAGE_SIZE)
        self.space: AddressSpace = self.memory.address_space("space", self.memory.container("root"))
        self.follower = Follower()
        self.follower.begin()
        self.follower.region_add(self.at(0))
        self.follower.commit()

    def at(self, page: int, pages: int = 1) -> MemoryRegionSection:
        return MemoryRegionSection(self.ram, self.space, 0, page * PAGE_SIZE, pages * PAGE_SIZE)


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.memory.close()


def test_right_telling_is_accepted(script: Script) -> None:
    follower = script.follower
    follower.begin()
    follower.region_nop(script.at(0))
    follower.log_start(script.at(0), NONE, Client.DISPLAY)
    follower.region_add(script.at(1))
    follower.coalesced_io_add(script.at(1), PAGE_SIZE, 4)
    follower.eventfd_add(script.at(1), False, 0, 3)
    follower.commit()
    follower.begin()
    follower.coalesced_io_del(script.at(1), PAGE_SIZE, 4)
    follower.region_del(script.at(1))
    follower.region_nop(script.at(0))
    follower.log_stop(script.at(0), Client.DISPLAY, NONE)
    follower.eventfd_del(script.at(1), False, 0, 3)
    follower.commit()


Tell = Callable[[MemoryRegionSection], None]


def tell(script: Script, first: Tell, page: int, second: Tell, other_page: int) -> None:
    first(script.at(page))
    second(script.at(other_page))


WRONG: list[tuple[str, Callable[[Script, Follower], None]]] = [
    ("range not mentioned", lambda script, follower: follower.commit()),
    ("begin twice", lambda script, follower: follower.begin()),
    ("overlap", lambda script, follower: follower.region_add(script.at(0, 2))),
    ("unknown kept", lambda script, follower: follower.region_nop(script.at(1))),
    ("other size kept", lambda script, follower: follower.region_nop(script.at(0, 2))),
    ("unknown gone", lambda script, follower: follower.region_del(script.at(1))),
    ("removal late", lambda script, follower: tell(script, follower.region_nop, 0, follower.region_del, 0)),
    ("descending", lambda script, follower: tell(script, follower.region_add, 2, follower.region_add, 1)),
    ("start unannounced", lambda script, follower: follower.log_start(script.at(0), NONE, Client.DISPLAY)),
    ("stop of what is not logged", lambda script, follower: follower.log_stop(script.at(0), Client.DISPLAY, NONE)),
    ("global stop first", lambda script, follower: follower.log_global_stop()),
    ("unknown eventfd", lambda script, follower: follower.eventfd_del(script.at(0), False, 0, 3)),
    ("part past its range", lambda script, follower: follower.coalesced_io_add(script.at(0), PAGE_SIZE - 2, 4)),
    ("unknown part", lambda script, follower: follower.coalesced_io_del(script.at(0), 0, 4)),
]


@pytest.mark.parametrize("wrong", [wrong for _, wrong in WRONG], ids=[name for name, _ in WRONG])
def test_wrong_telling_is_noticed(script: Script, wrong: Callable[[Script, Follower], None]) -> None:
    script.follower.begin()
    with pytest.raises((AssertionError, KeyError)):
        wrong(script, script.follower)


def test_view_that_differs_is_noticed(script: Script) -> None:
    with pytest.raises(AssertionError):
        script.follower.check(script.space)
