import numpy as np
import pytest
from support.oracles import to_bits, to_words

from dirtylog.errors import HostError
from dirtylog.linux.kvm import KVM, VM
from dirtylog.linux.kvm_abi import Capability, ManualProtect
from dirtylog.memory import Memory
from dirtylog.trackers import KVMLogMode, KVMLogTracker, MemorySlot
from dirtylog.trackers.kvm_log import choose_mode
from dirtylog.units import PAGE_SIZE

ENABLE, SET = ManualProtect.ENABLE, ManualProtect.INITIALLY_SET


class Offering(VM):
    """A VM of a kernel that offers some flags of manual protection."""

    def __init__(self, offered: int) -> None:
        self.offered = offered
        self.enabled: list[tuple[Capability, tuple[int, ...]]] = []

    def check(self, capability: Capability) -> int:
        return self.offered if capability is Capability.MANUAL_DIRTY_LOG_PROTECT2 else 0

    def enable(self, capability: Capability, *args: int) -> None:
        self.enabled.append((capability, args))


@pytest.mark.parametrize(
    ("offered", "wanted", "chosen", "flags"),
    [
        (0, None, KVMLogMode.LEGACY, None),
        (1, None, KVMLogMode.MANUAL, 1),
        (3, None, KVMLogMode.INITIALLY_SET, 3),
        (7, None, KVMLogMode.INITIALLY_SET, 3),
        (2, None, KVMLogMode.LEGACY, None),
        (3, KVMLogMode.LEGACY, KVMLogMode.LEGACY, None),
        (3, KVMLogMode.MANUAL, KVMLogMode.MANUAL, 1),
        (0, KVMLogMode.LEGACY, KVMLogMode.LEGACY, None),
        (3, KVMLogMode.RING, KVMLogMode.RING, None),
    ],
)
def test_best_or_wanted_mode_is_turned_on(
    offered: int, wanted: KVMLogMode | None, chosen: KVMLogMode, flags: int | None
) -> None:
    vm = Offering(offered)

    assert choose_mode(vm, wanted) is chosen
    assert vm.enabled == ([] if flags is None else [(Capability.MANUAL_DIRTY_LOG_PROTECT2, (flags,))])


@pytest.mark.parametrize(
    ("offered", "wanted", "remedy"),
    [
        (0, KVMLogMode.MANUAL, "use legacy"),
        (0, KVMLogMode.INITIALLY_SET, "use legacy"),
        (1, KVMLogMode.INITIALLY_SET, "use manual or legacy"),
    ],
)
def test_mode_that_the_kernel_lacks_is_refused(offered: int, wanted: KVMLogMode, remedy: str) -> None:
    vm = Offering(offered)
    with pytest.raises(HostError, match=f"no dirty log of mode '{wanted.value}'") as caught:
        choose_mode(vm, wanted)
    assert caught.value.remedy == remedy
    assert vm.enabled == []


@pytest.mark.parametrize("mode", KVMLogMode)
def test_only_manual_protection_keeps_what_is_read(mode: KVMLogMode) -> None:  # D5
    assert mode.clears_on_collect == (mode in (KVMLogMode.LEGACY, KVMLogMode.RING))


@pytest.mark.parametrize("mode", [mode for mode in KVMLogMode if mode is not KVMLogMode.RING])
@pytest.mark.parametrize("pages", [1, 64, 100])
def test_tracker_of_an_idle_slot(kvm: KVM, mode: KVMLogMode, pages: int) -> None:  # W3
    memory = Memory()
    ram = memory.ram("ram", pages * PAGE_SIZE)
    assert ram.block is not None
    words = to_words(range(pages), pages)
    everything = set(range(pages))
    with kvm.create_vm() as vm:
        choose_mode(vm, mode)
        slot = MemorySlot(vm, 3, gpa=1 << 32, pages=pages, hva=ram.block.mapping.address, readonly=False)
        tracker = KVMLogTracker(vm, mode, slot)
        assert (slot.number, tracker.pages) == (3, pages)
        tracker.collect(words)
        assert to_bits(words) == set()

        tracker.arm()
        tracker.collect(words)
        assert to_bits(words) == (everything if mode is KVMLogMode.INITIALLY_SET else set())

        tracker.clear(0, pages, to_words(everything, pages))
        tracker.collect(words)
        assert to_bits(words) == set()

        tracker.disarm()
        slot.remove()
        tracker.collect(words)
        assert np.count_nonzero(words) == 0
    memory.close()
