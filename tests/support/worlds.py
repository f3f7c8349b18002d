"""What the tests of trackers behind listeners run in: a memory, a listener under test, and somebody who writes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import numpy as np
from support.kvm import KVMWorld
from support.model_tracker import ModelWorld
from support.require import require
from unicorn import Uc
from unicorn import unicorn_const as unicorn
from unicorn import x86_const as x86

from dirtylog.errors import HostError
from dirtylog.linux.kvm import KVM
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.memory import AddressSpace, FlatRange, Memory, MemoryRegion
from dirtylog.testing import Differences
from dirtylog.testing.mechanisms import MECHANISMS
from dirtylog.testing.programs import CODE, LIST, LIST_END, WRITE_LIST, assembled
from dirtylog.trackers import KVMLogMode, TrackerListener
from dirtylog.trackers.own_memory import own_memory_listener
from dirtylog.units import PAGE_SIZE


class World(Protocol):
    """See `support.model_tracker.ModelWorld`, `support.kvm.KVMWorld`, and below."""

    memory: Memory
    ram: MemoryRegion
    root: MemoryRegion
    system: AddressSpace
    listener: TrackerListener

    def write(self, addresses: Sequence[int]) -> None:
        """Add 1 to the byte at each address, one after the other, as a guest does."""

    def close(self) -> None:
        """Take everything apart."""


class HostWorld:
    """`ModelWorld` whose trackers watch blocks of this process's memory, to which it writes itself."""

    def __init__(self, mechanism: str, pages: int) -> None:
        self.memory = Memory()
        self.ram: MemoryRegion = self.memory.ram("ram", pages * PAGE_SIZE)
        self.root = self.memory.container("root")
        self.system: AddressSpace = self.memory.address_space("system", self.root)
        self.listener: TrackerListener = own_memory_listener(mechanism, nullcontext)
        self.memory.register(self.listener, self.system)

    def write(self, addresses: Sequence[int]) -> None:
        for address in addresses:
            (place,) = [flat for flat in self.shown() if flat.start <= address < flat.end]
            assert place.region.block is not None
            place.region.block.array[address - place.start + place.offset] += 1

    def shown(self) -> Iterator[FlatRange]:
        """Where there is memory that can be written."""
        for flat in self.system.view.ranges:
            if flat.region.block is not None and flat.direct and not flat.readonly:
                yield flat

    def close(self) -> None:
        self.memory.unregister(self.listener)
        self.memory.close()


class UnicornWorld(HostWorld):
    """The same, with a guest that writes."""

    def write(self, addresses: Sequence[int]) -> None:
        listed = np.array(addresses, "<u4")
        guest = Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
        with closing(MemfdMapping("room", LIST_END - CODE)) as room:
            guest.mem_map_ptr(CODE, room.size, unicorn.UC_PROT_ALL, room.address)
            for flat in self.shown():
                assert flat.region.block is not None
                host = flat.region.block.mapping.address + flat.offset
                guest.mem_map_ptr(flat.start, flat.size, unicorn.UC_PROT_ALL, host)
            guest.mem_write(CODE, assembled(WRITE_LIST))
            guest.mem_write(LIST, listed.tobytes())
            guest.reg_write(x86.UC_X86_REG_ESI, LIST)
            guest.reg_write(x86.UC_X86_REG_ECX, listed.size)
            guest.emu_start(CODE, LIST)
            del guest


@dataclass(frozen=True)
class Setting:
    """A listener under test.

    Attributes:
        name: its name.
        make: makes its world of so many pages.
        differences: of its trackers.
    """

    name: str
    make: Callable[[int], World]
    differences: Differences


def _in_model(mode: KVMLogMode) -> Setting:
    return Setting(f"model-{mode.value}", partial(ModelWorld, mode), _kvm_differences(mode))


def _in_kvm(mode: KVMLogMode) -> Setting:
    return Setting(f"kvm-{mode.value}", partial(_make_kvm, mode), _kvm_differences(mode))


def _make_kvm(mode: KVMLogMode, pages: int) -> World:
    try:
        kvm = KVM()
    except HostError as error:
        require("kvm", False, str(error))
        raise
    with kvm:
        return KVMWorld(kvm, mode, pages)


def _kvm_differences(mode: KVMLogMode) -> Differences:
    return MECHANISMS[f"kvm-{mode.value}"].differences


def _on_host(kind: type[HostWorld], mechanism: str) -> Setting:
    name = kind.__name__.removesuffix("World").lower()
    return Setting(f"{name}-{mechanism}", partial(_make_host, kind, mechanism), MECHANISMS[mechanism].differences)


def _make_host(kind: type[HostWorld], mechanism: str, pages: int) -> World:
    failure = MECHANISMS[mechanism].failure()
    require(MECHANISMS[mechanism].needs, failure is None, str(failure))
    return kind(mechanism, pages)


SETTINGS: Final = (
    *map(_in_model, KVMLogMode),
    *map(_in_kvm, KVMLogMode),
    *(
        _on_host(kind, mechanism)
        for kind in (HostWorld, UnicornWorld)
        for mechanism in ("write-watch", "soft-dirty", "comparison")
    ),
)
"""Every listener, with each tracker that it is used with."""
