"""What this host offers to dirtylog: every answer is tried or asked of the kernel, none is inferred from a version.

An attempt returns a `Fact`, or raises a dirtylog error whose cause and remedy become those of the finding.
"""

import mmap
import platform
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from dirtylog.errors import DirtylogError, HostError
from dirtylog.linux.kvm import KVM, KVM_DEVICE
from dirtylog.linux.kvm_abi import API_VERSION, Capability, ManualProtect
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.linux.pagemap import Category, Pagemap, has_soft_dirty
from dirtylog.linux.userfaultfd import USERFAULTFD_DEVICE, Feature, RegisterMode, Userfaultfd
from dirtylog.units import KIB, PAGE_SIZE, format_size

HUGE_PAGES: Final = Path("/sys/kernel/mm/hugepages")

_UNPRIVILEGED: Final = Path("/proc/sys/vm/unprivileged_userfaultfd")
_RING_ENTRY_SIZE: Final = 16  # struct kvm_dirty_gfn
_WRITE_WATCH: Final = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM


@dataclass(frozen=True)
class Finding:
    """One thing that a host may offer.

    Attributes:
        name: its name, which does not change between versions of dirtylog.
        group: the heading it stands under.
        purpose: what it is good for.
        essential: whether KVM guests cannot be run and migrated without it.
        available: whether it is there and works.
        detail: what was found, or why it is not available; may be empty.
        value: the number that was found, where there is one.
        remedy: how to get it, when it is not available and there is a way.
    """

    name: str
    group: str
    purpose: str
    essential: bool
    available: bool
    detail: str
    value: int | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class HostReport:
    """All findings about a host.

    Attributes:
        kernel: its release, for the reader; nothing is derived from it.
        machine: its architecture.
        findings: in the order in which they are best read.
    """

    kernel: str
    machine: str
    findings: tuple[Finding, ...]

    @property
    def missing_essentials(self) -> tuple[Finding, ...]:
        """What stands between this host and running and migrating KVM guests."""
        return tuple(finding for finding in self.findings if finding.essential and not finding.available)


class Fact(NamedTuple):
    """What an attempt found."""

    detail: str = ""
    value: int | None = None


class _Subject(NamedTuple):
    group: str
    name: str
    purpose: str
    remedy: str | None = None
    essential: bool = False

    def missing(self, error: DirtylogError) -> Finding:
        remedy = error.remedy or self.remedy
        return Finding(self.name, self.group, self.purpose, self.essential, False, error.cause, remedy=remedy)

    def found(self, fact: Fact) -> Finding:
        return Finding(self.name, self.group, self.purpose, self.essential, True, fact.detail, fact.value)

    def attempt(self, attempt: Callable[[], Fact]) -> Finding:
        try:
            return self.found(attempt())
        except DirtylogError as error:
            return self.missing(error)


def _linux(release: str) -> str:
    return f"use Linux {release} or newer"


def _make_vm(kvm: KVM) -> Fact:
    with kvm.create_vm():
        return Fact()


def _ask(capability: Capability, mask: int = -1, describe: Callable[[int], str] | None = None) -> Callable[[KVM], Fact]:
    """An attempt to find a capability: the bits of KVM's answer that mean yes, and what the answer tells."""

    def attempt(kvm: KVM) -> Fact:
        answer = kvm.check(capability)
        if not answer & mask:
            raise HostError(f"KVM does not offer KVM_CAP_{capability.name}")
        return Fact(describe(answer), answer) if describe else Fact()

    return attempt


def _entries(ring_size: int) -> str:
    return f"up to {ring_size // _RING_ENTRY_SIZE:,} entries a vCPU"


_GUESTS: Final = "KVM guests"
_LOGS: Final = "What KVM tells of a guest's writes"
_WRITES: Final = "What the kernel tells of anybody's writes"
_MEMORY: Final = "Memory"

_MACHINE: Final = _Subject(_GUESTS, "x86-64", "guests are PCs", "run KVM guests on an x86-64 host", True)
_KVM: Final = _Subject(_GUESTS, "kvm", "runs guests", None, True)
_KVM_TABLE: Final[tuple[tuple[_Subject, Callable[[KVM], Fact]], ...]] = (
    (_Subject(_GUESTS, "kvm-vm", "makes a virtual machine", "look for KVM's reason in 'dmesg'", True), _make_vm),
    (
        _Subject(_GUESTS, "irqchip", "interrupts and timers", "use a kernel with CONFIG_KVM_IOAPIC", True),
        _ask(Capability.IRQCHIP),
    ),
    (
        _Subject(_GUESTS, "immediate-exit", "pauses a guest at once", _linux("4.11"), True),
        _ask(Capability.IMMEDIATE_EXIT),
    ),
    (
        _Subject(_GUESTS, "memory-slots", "ranges of guest memory"),
        _ask(Capability.NR_MEMSLOTS, describe="up to {:,}".format),
    ),
    (
        _Subject(_GUESTS, "readonly-memory", "ROM", _linux("3.7")),
        _ask(Capability.READONLY_MEM),
    ),
    (
        _Subject(_GUESTS, "ioeventfd", "a guest rings a device without waiting for it", _linux("2.6.32")),
        _ask(Capability.IOEVENTFD),
    ),
    (
        _Subject(_GUESTS, "irqfd", "interrupts from other threads and processes", _linux("2.6.32")),
        _ask(Capability.IRQFD),
    ),
    (
        _Subject(_GUESTS, "coalesced-mmio", "batches writes to device memory", _linux("2.6.28")),
        _ask(Capability.COALESCED_MMIO),
    ),
    (
        _Subject(_GUESTS, "coalesced-pio", "batches writes to ports", _linux("4.20")),
        _ask(Capability.COALESCED_PIO),
    ),
    (
        _Subject(_LOGS, "dirty-log", "tells the pages written, and forgets them at once", None, True),
        lambda _kvm: Fact(),  # as old as KVM, without a capability
    ),
    (
        _Subject(_LOGS, "manual-protect", "forgets a range just before it is copied", _linux("5.2")),
        _ask(Capability.MANUAL_DIRTY_LOG_PROTECT2, ManualProtect.ENABLE),
    ),
    (
        _Subject(_LOGS, "initially-all-set", "starts without protecting all memory first", _linux("5.7")),
        _ask(Capability.MANUAL_DIRTY_LOG_PROTECT2, ManualProtect.INITIALLY_SET),
    ),
    (
        _Subject(_LOGS, "dirty-ring", "costs by pages written, not by size of memory", _linux("5.11")),
        _ask(Capability.DIRTY_LOG_RING, describe=_entries),
    ),
    (
        _Subject(_LOGS, "dirty-ring-acq-rel", "the ring, safe on any processor", _linux("6.1")),
        _ask(Capability.DIRTY_LOG_RING_ACQ_REL, describe=_entries),
    ),
    (
        _Subject(_LOGS, "dirty-ring-bitmap", "for writes by no vCPU", "nothing to do: only Arm has and needs it"),
        _ask(Capability.DIRTY_LOG_RING_WITH_BITMAP),
    ),
)

_UFFD: Final = _Subject(_WRITES, "userfaultfd", "the way to all that is named uffd-...")
_FEATURE_TABLE: Final = (
    (_Subject(_WRITES, "uffd-wp", "protects private memory", _linux("5.7")), Feature.PAGEFAULT_FLAG_WP),
    (_Subject(_WRITES, "uffd-wp-shmem", "protects shared memory", _linux("5.19")), Feature.WP_HUGETLBFS_SHMEM),
    (_Subject(_WRITES, "uffd-wp-unpopulated", "protects absent pages", _linux("6.4")), Feature.WP_UNPOPULATED),
    (_Subject(_WRITES, "uffd-wp-async", "writers are noted, not stopped", _linux("6.7")), Feature.WP_ASYNC),
    (_Subject(_WRITES, "uffd-missing-shmem", "brings a page on first touch", _linux("4.11")), Feature.MISSING_SHMEM),
    (_Subject(_WRITES, "uffd-minor-shmem", "maps a page on first touch", _linux("5.14")), Feature.MINOR_SHMEM),
    (_Subject(_WRITES, "uffd-poison", "marks a page that was lost", _linux("6.6")), Feature.POISON),
    (_Subject(_WRITES, "uffd-move", "brings a page without copying it", _linux("6.8")), Feature.MOVE),
)
_SCAN: Final = _Subject(_WRITES, "pagemap-scan", "finds written pages in one call", _linux("6.7"))
_WATCH: Final = _Subject(_WRITES, "write-watch", "protects, scans, protects again; tried on a page", _linux("6.7"))
_SOFT_DIRTY: Final = _Subject(
    _WRITES, "soft-dirty", "the same on older kernels", "use a kernel with CONFIG_MEM_SOFT_DIRTY, as Debian's are"
)

_PAGE_SIZE: Final = _Subject(
    _MEMORY, "page-size", "each bit of a dirty log is one page", "use a kernel with 4 KiB pages", True
)
_MEMFD: Final = _Subject(_MEMORY, "memfd", "guest memory that others can map too", _linux("3.17"), True)
_POPULATE: Final = _Subject(_MEMORY, "populate", "makes pages ahead of their contents", _linux("5.14"))
_HUGE: Final = _Subject(_MEMORY, "huge-pages", "memory of large guests", "reserve some: sysctl vm.nr_hugepages=512")


def probe_host(
    *, kvm_device: str = KVM_DEVICE, userfaultfd_device: str = USERFAULTFD_DEVICE, huge_pages: Path = HUGE_PAGES
) -> HostReport:
    """Try what this host offers. Needs no privilege, changes nothing, and takes some milliseconds."""
    findings = (
        _MACHINE.attempt(_check_machine),
        *_probe_kvm(kvm_device),
        *_probe_userfaultfd(userfaultfd_device),
        _SCAN.attempt(_scan_own_page),
        _WATCH.attempt(partial(_watch_own_page, userfaultfd_device)),
        _SOFT_DIRTY.attempt(_check_soft_dirty),
        _PAGE_SIZE.attempt(_check_page_size),
        _MEMFD.attempt(_make_memfd),
        _POPULATE.attempt(_populate_own_page),
        _HUGE.attempt(partial(_count_huge_pages, huge_pages)),
    )
    return HostReport(platform.release(), platform.machine(), findings)


def _check_machine() -> Fact:
    if platform.machine() not in ("x86_64", "AMD64"):
        raise HostError(f"this is {platform.machine()}")
    return Fact()


def _probe_kvm(device: str) -> list[Finding]:
    try:
        kvm = KVM(device)
    except HostError as error:
        unknown = HostError("unknown without kvm", remedy="get kvm first")
        return [_KVM.missing(error), *(subject.missing(unknown) for subject, _ in _KVM_TABLE)]
    with kvm:
        found = _KVM.found(Fact(f"{device}, API version {API_VERSION}", API_VERSION))
        return [found, *(subject.attempt(partial(attempt, kvm)) for subject, attempt in _KVM_TABLE)]


def _probe_userfaultfd(device: str) -> list[Finding]:
    try:
        with Userfaultfd(device=device) as userfaultfd:
            access, offered = userfaultfd.access, userfaultfd.features
    except HostError as error:
        unknown = HostError("unknown without userfaultfd", remedy="get userfaultfd first")
        return [_UFFD.missing(error), *(subject.missing(unknown) for subject, _ in _FEATURE_TABLE)]
    setting = f"; vm.unprivileged_userfaultfd is {_UNPRIVILEGED.read_text().strip()}" if _UNPRIVILEGED.exists() else ""
    lacks = HostError("this kernel does not offer it")
    return [
        _UFFD.found(Fact(f"by {access.value}{setting}", int(offered))),
        *(
            subject.found(Fact()) if feature in offered else subject.missing(lacks)
            for subject, feature in _FEATURE_TABLE
        ),
    ]


def _scan_own_page() -> Fact:
    with closing(MemfdMapping("dirtylog-probe", PAGE_SIZE)) as memory, Pagemap() as pagemap:
        memory.array[0] = 1
        found = pagemap.scan(memory.address, memory.address + PAGE_SIZE, Category.WRITTEN)
        if len(found) != 1:
            raise HostError("a page just written was not found")
    return Fact()


def _watch_own_page(device: str) -> Fact:
    with (
        closing(MemfdMapping("dirtylog-probe", 2 * PAGE_SIZE)) as memory,
        Userfaultfd(_WRITE_WATCH, device=device) as userfaultfd,
        Pagemap() as pagemap,
    ):
        start, end = memory.address, memory.address + 2 * PAGE_SIZE
        userfaultfd.register(start, 2 * PAGE_SIZE, RegisterMode.WP)
        pagemap.scan(start, end, Category.WRITTEN, protect=True)
        memory.array[PAGE_SIZE] = 1
        found = pagemap.scan(start, end, Category.WRITTEN, protect=True)
        if [(int(region["start"]), int(region["end"])) for region in found] != [(start + PAGE_SIZE, end)]:
            raise HostError("it did not find exactly the page that was written")
    return Fact()


def _check_soft_dirty() -> Fact:
    if not has_soft_dirty():
        raise HostError("this kernel does not keep the bits")
    return Fact()


def _check_page_size() -> Fact:
    if mmap.PAGESIZE != PAGE_SIZE:
        raise HostError(f"this kernel's pages are {mmap.PAGESIZE} bytes")
    return Fact(f"{PAGE_SIZE} bytes", PAGE_SIZE)


def _make_memfd() -> Fact:
    with closing(MemfdMapping("dirtylog-probe", PAGE_SIZE)):
        return Fact()


def _populate_own_page() -> Fact:
    with closing(MemfdMapping("dirtylog-probe", PAGE_SIZE)) as memory:
        memory.populate(0, PAGE_SIZE)
    return Fact()


def _count_huge_pages(directory: Path) -> Fact:
    pools = {
        int(pool.name.removeprefix("hugepages-").removesuffix("kB")) * KIB: (
            int((pool / "free_hugepages").read_text()),
            int((pool / "nr_hugepages").read_text()),
        )
        for pool in directory.glob("hugepages-*kB")
    }
    if not pools:
        raise HostError("this kernel has none", remedy="use a kernel with CONFIG_HUGETLBFS")
    detail = ", ".join(
        f"{free} of {count} {format_size(size)} pages free" for size, (free, count) in sorted(pools.items())
    )
    if not any(free for free, _ in pools.values()):
        raise HostError(detail)
    return Fact(detail, sum(size * free for size, (free, _) in pools.items()))
