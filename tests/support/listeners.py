"""Listeners that write down what they are told, and one that follows it and fails where it cannot be."""

from collections import Counter
from typing import NamedTuple

from dirtylog.memory import AddressSpace, Client, IOEventFD, MemoryListener, MemoryRegion, MemoryRegionSection

NONE = Client(0)


class Seen(NamedTuple):
    """A section, in values that compare."""

    region: str
    offset: int
    address: int
    size: int


class Told(NamedTuple):
    """One callback: who was told what."""

    listener: str
    callback: str
    section: Seen | None = None
    old: Client = NONE
    new: Client = NONE


def seen(section: MemoryRegionSection) -> Seen:
    return Seen(section.region.name, section.offset_within_region, section.offset_within_address_space, section.size)


class Recorder(MemoryListener):
    """Adds to a log that several may share, since the order among them is what many rules are about."""

    def __init__(self, log: list[Told], name: str = "", priority: int = 0) -> None:
        self.log = log
        self.name = name
        self.priority = priority

    def tell(
        self, callback: str, section: MemoryRegionSection | None = None, old: Client = NONE, new: Client = NONE
    ) -> None:
        self.log.append(Told(self.name, callback, None if section is None else seen(section), old, new))

    def begin(self) -> None:
        self.tell("begin")

    def commit(self) -> None:
        self.tell("commit")

    def region_add(self, section: MemoryRegionSection) -> None:
        self.tell("region_add", section)

    def region_del(self, section: MemoryRegionSection) -> None:
        self.tell("region_del", section)

    def region_nop(self, section: MemoryRegionSection) -> None:
        self.tell("region_nop", section)

    def log_start(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        self.tell("log_start", section, old, new)

    def log_stop(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        self.tell("log_stop", section, old, new)

    def log_sync(self, section: MemoryRegionSection) -> None:
        self.tell("log_sync", section)

    def log_clear(self, section: MemoryRegionSection) -> None:
        self.tell("log_clear", section)

    def log_global_start(self) -> None:
        self.tell("log_global_start")

    def log_global_stop(self) -> None:
        self.tell("log_global_stop")

    def log_global_after_sync(self) -> None:
        self.tell("log_global_after_sync")


class IORecorder(Recorder):
    """A recorder of eventfds and coalesced parts as well, each a line of its own in ``io``."""

    def __init__(self, log: list[Told], name: str = "", priority: int = 0) -> None:
        super().__init__(log, name, priority)
        self.io: list[tuple[str, int, int]] = []

    def _io(self, callback: str, address: int, size: int, section: MemoryRegionSection) -> None:
        self.io.append((callback, address, size))
        self.tell(callback, section)

    def eventfd_add(self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> None:
        self._io("eventfd_add", section.offset_within_address_space, section.size, section)

    def eventfd_del(self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> None:
        self._io("eventfd_del", section.offset_within_address_space, section.size, section)

    def coalesced_io_add(self, section: MemoryRegionSection, address: int, size: int) -> None:
        self._io("coalesced_io_add", address, size, section)

    def coalesced_io_del(self, section: MemoryRegionSection, address: int, size: int) -> None:
        self._io("coalesced_io_del", address, size, section)


class Shown(NamedTuple):
    """What a range shows."""

    region: MemoryRegion
    offset: int
    size: int
    readonly: bool
    direct: bool


class Follower(MemoryListener):
    """Keeps a view of its own from what it is told, and fails at once where that does not fit what it knows."""

    def __init__(self, priority: int = 0) -> None:
        self.priority = priority
        self.ranges: dict[int, Shown] = {}
        self.logging: dict[int, Client] = {}
        self.eventfds: set[IOEventFD] = set()
        self.coalesced: Counter[tuple[int, int]] = Counter()
        self.tracking = False
        self._step = "rest"
        self._last = -1
        self._touched: set[int] = set()
        self._joining = True

    def begin(self) -> None:
        assert self._step == "rest"
        self._step, self._last, self._touched = "removals", -1, set()

    def commit(self) -> None:
        assert self._step != "rest"
        assert self._touched == self.ranges.keys()
        assert self.logging.keys() == self.ranges.keys()
        self._step, self._joining = "rest", False

    def _walk(self, section: MemoryRegionSection, step: str) -> int:
        """The section's address; removals, then all else, each ascending."""
        assert self._step == step or (self._step, step) == ("removals", "rest of the view")
        if self._step != step:
            self._step, self._last = step, -1
        assert section.offset_within_address_space > self._last
        self._last = section.offset_within_address_space
        return self._last

    def region_del(self, section: MemoryRegionSection) -> None:
        address = self._walk(section, "removals")
        assert self.ranges.pop(address) == _shown(section)
        assert not any(address <= at < address + section.size for at, _ in self.coalesced.elements())
        del self.logging[address]

    def region_add(self, section: MemoryRegionSection) -> None:
        address = self._walk(section, "rest of the view")
        assert not any(at < address + section.size and address < at + it.size for at, it in self.ranges.items())
        self.ranges[address] = _shown(section)
        self.logging[address] = NONE if self._joining else section.region.logging
        self._touched.add(address)

    def region_nop(self, section: MemoryRegionSection) -> None:
        address = self._walk(section, "rest of the view")
        assert self.ranges[address] == _shown(section)
        self._touched.add(address)

    def log_start(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        address = section.offset_within_address_space
        assert self._last == address
        assert self.ranges[address] == _shown(section)
        assert self.logging[address] == old
        assert new & ~old
        assert self.tracking or not new & Client.MIGRATION
        self.logging[address] = old | new  # those who stop at the same time are told of next

    def log_stop(self, section: MemoryRegionSection, old: Client, new: Client) -> None:
        address = section.offset_within_address_space
        assert self.ranges[address] == _shown(section)
        assert self.logging[address] == old | new
        assert old & ~new
        self.logging[address] = new

    def log_global_start(self) -> None:
        assert not self.tracking
        self.tracking = True

    def log_global_stop(self) -> None:
        assert self.tracking
        assert not any(clients & Client.MIGRATION for clients in self.logging.values())
        self.tracking = False

    def eventfd_add(self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> None:
        added = IOEventFD(section.offset_within_address_space, section.size, match_data, data, eventfd)
        assert added not in self.eventfds
        self.eventfds.add(added)

    def eventfd_del(self, section: MemoryRegionSection, match_data: bool, data: int, eventfd: int) -> None:
        self.eventfds.remove(IOEventFD(section.offset_within_address_space, section.size, match_data, data, eventfd))

    def coalesced_io_add(self, section: MemoryRegionSection, address: int, size: int) -> None:
        self._check_part(section, address, size)
        self.coalesced[address, size] += 1

    def coalesced_io_del(self, section: MemoryRegionSection, address: int, size: int) -> None:
        self._check_part(section, address, size)
        assert self.coalesced[address, size]
        self.coalesced[address, size] -= 1

    def _check_part(self, section: MemoryRegionSection, address: int, size: int) -> None:
        start = section.offset_within_address_space
        assert self.ranges[start] == _shown(section)
        assert start <= address < address + size <= start + section.size

    def check_gone(self) -> None:
        """It was let go, and knows of nothing any more."""
        assert not self.ranges
        assert not self.logging
        assert not self.eventfds
        assert not self.coalesced.total()

    def check(self, space: AddressSpace) -> None:
        """What it knows is what there is."""
        shown = {
            flat.start: Shown(flat.region, flat.offset, flat.size, flat.readonly, flat.direct)
            for flat in space.view.ranges
        }
        assert self.ranges == shown
        assert self.logging == {flat.start: flat.logging for flat in space.view.ranges}
        assert self.tracking == bool(space.memory.tracking)
        assert self.eventfds == {
            eventfd._replace(address=eventfd.address - it.offset + start)
            for start, it in shown.items()
            for eventfd in it.region.eventfds
            if any(0 <= byte - it.offset < it.size for byte in _bytes_of(eventfd))
        }
        assert +self.coalesced == Counter(
            (low - it.offset + start, high - low)
            for start, it in shown.items()
            for part in it.region.coalesced
            if (low := max(part.offset, it.offset)) < (high := min(part.offset + part.size, it.offset + it.size))
        )


def _shown(section: MemoryRegionSection) -> Shown:
    return Shown(section.region, section.offset_within_region, section.size, section.readonly, section.direct)


def _bytes_of(eventfd: IOEventFD) -> range:
    return range(eventfd.address, eventfd.address + max(eventfd.size, 1))
