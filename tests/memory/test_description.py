import json

import msgspec

from dirtylog.memory import Client, Memory, MemoryListener, MemoryRegionOps, MemoryRegionSection, TrackingReason
from dirtylog.memory.description import (
    AddressSpaceDescription,
    MemoryDescription,
    RangeDescription,
    RegionDescription,
)
from dirtylog.units import PAGE_SIZE


def region(name: str, kind: str, address: int, size: int, **facts: object) -> RegionDescription:
    defaults: dict[str, object] = {
        "priority": 0,
        "enabled": True,
        "readonly": False,
        "logging": (),
        "target": None,
        "target_offset": 0,
        "children": (),
    }
    return RegionDescription(name, kind, address, size, **(defaults | facts))  # type: ignore[arg-type]  # by name


def part(start: int, size: int, name: str, kind: str, offset: int = 0, **facts: object) -> RangeDescription:
    defaults: dict[str, object] = {"readonly": False, "logging": (), "dirty": {}}
    return RangeDescription(start, size, name, kind, offset, **(defaults | facts))  # type: ignore[arg-type]  # by name


def test_new_memory_has_nothing_to_tell() -> None:
    assert Memory().describe() == MemoryDescription((), ())


def test_tree_tells_each_region_as_it_is_mapped_and_the_view_what_answers() -> None:
    memory = Memory()
    root, inner = memory.container("root"), memory.container("inner", 1 << 20)
    device, ram = memory.mmio("device", 16, MemoryRegionOps()), memory.ram("ram", 4 * PAGE_SIZE)
    hole, window = memory.reservation("hole", PAGE_SIZE), memory.alias("window", ram, PAGE_SIZE, 2 * PAGE_SIZE)
    root.add(inner, 0x100000, priority=-1)
    root.add(window, 0)
    inner.add(device, 0x40)
    inner.add(hole, 0x1000)
    hole.set_enabled(False)
    window.set_readonly(True)
    memory.address_space("space", root)

    tree = region(
        "root",
        "container",
        0,
        1 << 64,
        children=(
            region("window", "alias", 0, 2 * PAGE_SIZE, readonly=True, target="ram", target_offset=PAGE_SIZE),
            region(
                "inner",
                "container",
                0x100000,
                1 << 20,
                priority=-1,
                children=(
                    region("hole", "reservation", 0x101000, PAGE_SIZE, enabled=False),
                    region("device", "mmio", 0x100040, 16),
                ),
            ),
        ),
    )
    ranges = (
        part(0, 2 * PAGE_SIZE, "ram", "ram", PAGE_SIZE, readonly=True),
        part(0x100040, 16, "device", "mmio"),
    )
    assert memory.describe() == MemoryDescription((AddressSpaceDescription("space", tree, ranges),), ())
    memory.close()


def test_kinds_of_memory_are_told_apart_and_so_is_what_is_trapped() -> None:
    memory = Memory()
    root = memory.container("root", 1 << 20)
    flash = memory.rom_device("flash", b"\1", MemoryRegionOps())
    root.add(memory.rom("bios", b"\1"), 0)
    root.add(flash, PAGE_SIZE)
    memory.address_space("space", root)

    def kinds() -> list[str]:
        return [one.kind for one in memory.describe().address_spaces[0].ranges]

    assert kinds() == ["rom", "rom-device"]
    flash.set_trapped(True)
    assert kinds() == ["rom", "rom-device, trapped"]
    memory.close()


def test_dirty_pages_are_counted_per_client_that_logs_and_per_range() -> None:
    memory = Memory()
    root, ram, vram = memory.container("root"), memory.ram("ram", 8 * PAGE_SIZE), memory.ram("vram", 2 * PAGE_SIZE)
    root.add(ram, 0)
    root.add(vram, 4 * PAGE_SIZE, priority=1)
    space = memory.address_space("space", root)

    assert all(not one.logging and not one.dirty for one in memory.describe().address_spaces[0].ranges)

    memory.start_logging(TrackingReason.MIGRATION)
    vram.start_logging_display()
    for block in (ram, vram):
        block.snapshot_and_clear_dirty(0, block.size, Client.MIGRATION)
    vram.snapshot_and_clear_dirty(0, vram.size, Client.DISPLAY)
    space.write(PAGE_SIZE, b"x")
    space.write(5 * PAGE_SIZE, b"x")
    space.write(7 * PAGE_SIZE - 1, b"xx")
    vram.snapshot_and_clear_dirty(0, vram.size, Client.MIGRATION)

    described = memory.describe()
    assert described.tracking == ("migration",)
    assert [(one.region, one.offset, one.logging, one.dirty) for one in described.address_spaces[0].ranges] == [
        ("ram", 0, ("migration",), {"migration": 1}),
        ("vram", 0, ("display", "migration"), {"display": 1, "migration": 0}),
        ("ram", 6 * PAGE_SIZE, ("migration",), {"migration": 2}),
    ]
    memory.close()


def test_nothing_is_synced() -> None:
    class Listener(MemoryListener):
        def log_sync(self, section: MemoryRegionSection) -> None:
            raise AssertionError("synced")

    memory = Memory()
    root = memory.container("root")
    root.add(memory.ram("ram", PAGE_SIZE), 0)
    memory.register(Listener(), memory.address_space("space", root))
    memory.start_logging(TrackingReason.MIGRATION)

    assert memory.describe().address_spaces[0].ranges[0].dirty == {"migration": 1}
    memory.close()


def test_all_reasons_for_logging_are_told() -> None:
    memory = Memory()
    memory.start_logging(TrackingReason.DIRTY_LIMIT)
    memory.start_logging(TrackingReason.MIGRATION)
    assert memory.describe().tracking == ("migration", "dirty_limit")


def test_removed_address_space_is_told_no_more() -> None:
    memory = Memory()
    root = memory.container("root")
    kept, gone = memory.address_space("kept", root), memory.address_space("gone", root)
    memory.remove_address_space(gone)
    assert [space.name for space in memory.describe().address_spaces] == [kept.name]


def test_description_survives_json_with_sizes_of_64_bits_and_more() -> None:
    memory = Memory()
    root = memory.container("root")
    root.add(memory.reservation("last", 1 << 64), (1 << 64) - 1)
    memory.address_space("space", root)
    described = memory.describe()

    text = msgspec.json.encode(described)
    assert json.loads(text)["address_spaces"][0]["root"]["size"] == 1 << 64
    assert msgspec.json.decode(text, type=MemoryDescription) == described
