"""A listener that writes down what it is told."""

from typing import NamedTuple

from dirtylog.memory import Client, MemoryListener, MemoryRegionSection

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
