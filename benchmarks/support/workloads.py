"""What guests do while they are migrated, and how it is known that they arrived whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from benchmarks.support.assembler import assemble_sector
from benchmarks.support.guest import GUEST_SECONDS, Guest
from dirtylog.guests import dirtier, random_writer
from dirtylog.guests.sector import LOAD_ADDRESS, STARTED
from dirtylog.units import MIB, format_rate, format_size

CONTENTS_ADDRESS: Final = 1 * MIB
"""Where random contents begin, if a guest has some: above all that belongs to a BIOS."""

_PULSE: Final = Path(__file__).with_name("pulse.S")
_PARAMETERS: Final = slice(8, 16)  # where guests/sector.inc has the range
_SLAB: Final = 32 * MIB
_ROUNDS_BEFORE: Final = 2  # then each page of the range has been written, and has its place in memory
_ROUNDS_AFTER: Final = 2
_WRITES_AFTER: Final = 100
_SECTOR_SIZE: Final = 512
_IDLE_CODE: Final = bytes.fromhex(
    "31c0"  # xor ax, ax
    "8ed8"  # mov ds, ax
    "66c7060880" + STARTED.hex() +  # mov dword [STARTED_ADDRESS], STARTED
    "fa"  # cli
    "f4"  # hlt
    "ebfd"  # jmp to hlt
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BootFiles:
    """What a guest is started from.

    Attributes:
        image: a boot sector.
        contents: what memory holds from `CONTENTS_ADDRESS` on; None for nothing.
        flat: the sector and the contents in one, to be loaded to `LOAD_ADDRESS`; None without contents.
    """

    image: Path
    contents: Path | None
    flat: Path | None

    def discard(self) -> None:
        """Remove them, before the host has got round to writing them to its disk."""
        for path in (self.image, self.contents, self.flat):
            if path is not None:
                path.unlink()


class Workload(Protocol):
    """What a guest does."""

    @property
    def still(self) -> bool:
        """Whether it writes nothing. Then a migration is one pass, whose speed can be compared."""

    @property
    def pulses(self) -> bool:
        """Whether it sends characters on its serial port all the time, each the one after the last, modulo 256."""

    @property
    def contents(self) -> int:
        """How many bytes of memory hold random contents before it starts."""

    def __str__(self) -> str:
        """What it does, for people."""

    @property
    def end(self) -> int:
        """The address after the last that it writes, or that has contents."""

    def image(self) -> bytes:
        """Its boot sector."""

    def ready(self, source: Guest) -> int:
        """Wait until all its memory is in place; how far it has got."""

    def check(self, destination: Guest, before: int) -> str | None:
        """What is wrong with it after it was migrated, or None; it is stopped meanwhile. ``before`` as of `ready`."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """Writes every page of a range in order, for ever."""

    first: int
    last: int
    still = False
    pulses = False
    contents = 0

    def __str__(self) -> str:
        return f"writes {range_text(self.first, self.last)}"

    @property
    def end(self) -> int:
        """See `Workload`."""
        return self.last

    def image(self) -> bytes:
        """See `Workload`."""
        return dirtier.build(self.first, self.last)

    def ready(self, source: Guest) -> int:
        """See `Workload`."""
        return source.reach(_ROUNDS_BEFORE)

    def check(self, destination: Guest, before: int) -> str | None:
        """See `Workload`."""
        arrived = _arrived(destination, before, "rounds")
        if isinstance(arrived, str):
            return arrived
        destination.reach(arrived + _ROUNDS_AFTER)
        destination.qmp.execute("stop")
        return dirtier.check_pages(destination.first_bytes(self.first, self.last), destination.rounds())


@dataclass(frozen=True, slots=True)
class Pulses(Rounds):
    """Does so too, and sends a character every 32 pages, by which it is heard."""

    pulses = True

    def __str__(self) -> str:
        return f"writes {range_text(self.first, self.last)} and sends a character every 32 pages"

    def image(self) -> bytes:
        """See `Workload`."""
        sector = bytearray(assemble_sector(_PULSE))
        sector[_PARAMETERS] = dirtier.build(self.first, self.last)[_PARAMETERS]
        return bytes(sector)


@dataclass(frozen=True, slots=True)
class Idle:
    """Does nothing, and has random contents."""

    contents: int
    still = True
    pulses = False

    def __str__(self) -> str:
        return f"is idle and has {format_size(self.contents)} of random contents"

    @property
    def end(self) -> int:
        """See `Workload`."""
        return CONTENTS_ADDRESS + self.contents

    def image(self) -> bytes:
        """See `Workload`."""
        return _IDLE_CODE.ljust(_SECTOR_SIZE - 2, b"\0") + b"\x55\xaa"

    def ready(self, source: Guest) -> int:
        """See `Workload`."""
        return source.until(source.rounds, GUEST_SECONDS, "start its guest")

    def check(self, destination: Guest, before: int) -> str | None:
        """See `Workload`."""
        if destination.rounds() != before:
            return "what it wrote is not there"
        destination.qmp.execute("stop")
        for offset, slab in random_slabs(self.contents):
            if destination.read(CONTENTS_ADDRESS + offset, len(slab)) != slab:
                return f"its contents are others somewhere in the {len(slab)} bytes from {offset:#x} on"
        return None


@dataclass(frozen=True, slots=True)
class RandomWrites:
    """Writes pages of a range at random, at a rate in bytes a second; memory has random contents before."""

    first: int
    last: int
    rate: float
    contents: int
    still = False
    pulses = False

    def __str__(self) -> str:
        return f"writes {range_text(self.first, self.last)} at random, {format_rate(self.rate)}"

    @property
    def end(self) -> int:
        """See `Workload`."""
        return max(self.last, CONTENTS_ADDRESS + self.contents)

    def image(self) -> bytes:
        """See `Workload`."""
        return random_writer.build(self.first, self.last, rate=self.rate)

    def ready(self, source: Guest) -> int:
        """See `Workload`."""
        return source.reach(1)

    def check(self, destination: Guest, before: int) -> str | None:
        """See `Workload`."""
        arrived = _arrived(destination, before, "writes")
        if isinstance(arrived, str):
            return arrived
        destination.reach(arrived + _WRITES_AFTER)
        destination.qmp.execute("stop")
        return random_writer.check_pages(destination.first_bytes(self.first, self.last), destination.rounds() or 0)


def range_text(first: int, last: int) -> str:
    """A range for people."""
    return f"{first / MIB:g}..{last / MIB:g} MiB"


def write_files(workload: Workload, directory: Path) -> BootFiles:
    """Make what a guest is started from."""
    sector = workload.image()
    image = directory / "guest.img"
    image.write_bytes(sector)
    if not workload.contents:
        return BootFiles(image, None, None)
    contents, flat = directory / "guest.contents", directory / "guest.flat"
    with contents.open("wb") as alone, flat.open("wb") as together:
        together.write(sector)
        together.seek(CONTENTS_ADDRESS - LOAD_ADDRESS)
        for _, slab in random_slabs(workload.contents):
            alone.write(slab)
            together.write(slab)
    return BootFiles(image, contents, flat)


def random_slabs(size: int) -> Iterator[tuple[int, bytes]]:
    """Random contents, the same each time, piece by piece, with the offset of each."""
    for offset in range(0, size, _SLAB):
        yield offset, np.random.default_rng(offset).bytes(min(_SLAB, size - offset))


def _arrived(destination: Guest, before: int, what: str) -> int | str:
    """How far the guest is where it arrived, or what is wrong with that."""
    arrived = destination.rounds()
    if arrived is None or arrived < before:
        return f"it had made {before} {what} before, and {arrived} after it was migrated"
    return arrived
