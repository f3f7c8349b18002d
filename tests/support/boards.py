"""A small memory, and what its listeners hear."""

from support.listeners import Recorder, Seen, Told

from dirtylog.memory import AddressSpace, Memory, MemoryRegion
from dirtylog.units import PAGE_SIZE


class Board:
    """Four RAM regions of one page, of which ``a`` and ``b`` are mapped; and a log that listeners share."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.root = self.memory.container("root")
        self.a, self.b, self.c, self.d = (self.memory.ram(name, PAGE_SIZE) for name in "abcd")
        self.space = self.memory.address_space("space", self.root)
        self.told: list[Told] = []
        with self.memory.transaction():
            self.map(self.a, 0)
            self.map(self.b, 4)

    def map(self, region: MemoryRegion, page: int, priority: int = 0) -> None:
        self.root.add(region, page * PAGE_SIZE, priority=priority)

    def listen(self, name: str = "x", priority: int = 0, space: AddressSpace | None = None) -> Recorder:
        recorder = Recorder(self.told, name, priority)
        self.memory.register(recorder, space or self.space)
        self.told.clear()
        return recorder

    def heard(self) -> list[str]:
        """Callbacks as ``listener:callback:region``, and forgets them."""
        heard = [
            ":".join(
                [told.listener, told.callback.removeprefix("region_")] + ([told.section.region] if told.section else [])
            )
            for told in self.told
        ]
        self.told.clear()
        return heard


def at(region: str, page: int) -> Seen:
    """The section that shows a page of RAM somewhere."""
    return Seen(region, 0, page * PAGE_SIZE, PAGE_SIZE)
