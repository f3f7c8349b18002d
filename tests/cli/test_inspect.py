import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.processes import Run, dirtylog

from dirtylog.cli.main import main
from dirtylog.control.qmp import CommandRegistry, NoArguments, QMPServer
from dirtylog.errors import UsageError
from dirtylog.guests.dirtier import build
from dirtylog.memory import Client, Memory, MemoryRegionOps, TrackingReason
from dirtylog.memory.description import (
    AddressSpaceDescription,
    MemoryDescription,
    RangeDescription,
    RegionDescription,
)
from dirtylog.units import GIB, MIB, PAGE_SIZE

Capture = pytest.CaptureFixture[str]
Inspect = Callable[..., int]

EMPTY: Final = MemoryDescription((), ())


class Machine:
    """A QMP server that describes what it was told to."""

    def __init__(self, path: Path) -> None:
        self.answer: Any = EMPTY
        registry = CommandRegistry()
        registry.add("x-query-memory", NoArguments, self._describe)
        self.server = QMPServer(path, registry)

    def _describe(self, _: NoArguments) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "qmp")
    with made.server:
        made.server.start()
        yield made


@pytest.fixture
def inspect(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inspect:
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *options: main(["inspect", str(tmp_path / "qmp"), *options])


def lines(capture: Capture) -> list[str]:
    out, err = capture.readouterr()
    assert err == ""
    return [line.rstrip() for line in out.splitlines()]


@pytest.fixture
def pc() -> Iterator[Memory]:
    """Memory as in a small PC, logged for migration, with a display."""
    memory = Memory()
    root, pci = memory.container("system"), memory.container("pci")
    ram, vram = memory.ram("ram", 4 * MIB), memory.ram("vram", MIB)
    root.add(memory.alias("ram-below-4g", ram, 0, 3 * MIB), 0)
    root.add(memory.rom("bios", b"\1"), 0xF0000, priority=1)
    hole = memory.reservation("hole", PAGE_SIZE)
    root.add(hole, 0xE0000, priority=3)
    root.add(pci, 0, priority=-1)
    pci.add(vram, 0xFD000000)
    pci.add(memory.mmio("vga", 0x1000, MemoryRegionOps()), 0xFEBF0000)
    hole.set_enabled(False)
    memory.address_space("memory", root)
    memory.start_logging(TrackingReason.MIGRATION)
    vram.start_logging_display()
    ram.snapshot_and_clear_dirty(0, ram.size, Client.MIGRATION)
    memory.address_spaces[0].write(0x5000, b"x")
    yield memory
    memory.close()


def test_tree_and_view_are_tables_of_at_most_80_columns(
    machine: Machine, inspect: Inspect, pc: Memory, capsys: Capture
) -> None:
    machine.answer = pc.describe()
    assert inspect() == 0
    assert lines(capsys) == [
        "logging of all RAM: migration",
        "",
        "address space memory",
        "00000000-ffffffffffffffff  system (container)",
        "├── 000e0000-000e0fff  hole (reservation, 4.0 KiB, priority 3, disabled)",
        "├── 000f0000-000f0fff  bios (rom, 4.0 KiB, priority 1)",
        "├── 00000000-002fffff  ram-below-4g (alias of ram from 0x0, 3.0 MiB)",
        "└── 00000000-ffffffffffffffff  pci (container, priority -1)",
        "    ├── febf0000-febf0fff  vga (mmio, 4.0 KiB)",
        "    └── fd000000-fd0fffff  vram (ram, 1.0 MiB)",
        "",
        "addresses          kind  region + offset  logged (dirty pages)",
        "00000000-000effff  ram   ram              migration (1)",
        "000f0000-000f0fff  rom   bios             migration (1)",
        "000f1000-002fffff  ram   ram + 0xf1000    migration (0)",
        "fd000000-fd0fffff  ram   vram             display (256), migration (256)",
        "febf0000-febf0fff  mmio  vga",
    ]


def far(name: str = "window", **facts: Any) -> RangeDescription:
    """A range whose addresses have 16 digits."""
    made = RangeDescription((1 << 63) + GIB, GIB, name, "ram", 0x1234_5000_0000, False, (), {})
    return dataclasses.replace(made, **facts)


LONG: Final = far(
    "a-window-with-quite-a-long-name",
    kind="rom-device, trapped",
    logging=("display", "code", "migration"),
    dirty={"display": 1, "code": 12_345_678, "migration": 262_144},
)


def test_clients_go_below_the_name_where_lines_would_be_too_long(
    machine: Machine, inspect: Inspect, capsys: Capture
) -> None:
    machine.answer = MemoryDescription((AddressSpaceDescription("memory", None, (LONG, far("b", start=0))),), ())
    assert inspect() == 0
    shown = lines(capsys)
    assert max(map(len, shown)) <= 80
    assert not any("…" in line for line in shown)
    for text in ("8000000040000000-800000007fffffff  rom-device, trapped", "display (1)", "code (12,345,678)"):
        assert any(text in line for line in shown), text
    assert sum("migration (262,144)" in line for line in shown) == 1
    assert any(line.startswith("0000000000000000-000000003fffffff  ram") for line in shown)


def test_wide_terminal_shows_a_line_a_range(
    machine: Machine, inspect: Inspect, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    machine.answer = MemoryDescription((AddressSpaceDescription("memory", None, (LONG,)),), ())
    assert inspect() == 0
    assert lines(capsys)[-1] == (
        "8000000040000000-800000007fffffff  rom-device, trapped  a-window-with-quite-a-long-name + 0x123450000000  "
        "display (1), code (12,345,678), migration (262,144)"
    )


def test_small_address_space_has_short_addresses_and_an_empty_one_says_so(
    machine: Machine, inspect: Inspect, capsys: Capture
) -> None:
    memory = Memory()
    ports = memory.container("io", 0x10000)
    ports.add(memory.mmio("serial", 8, MemoryRegionOps()), 0x3F8)
    memory.address_space("io", ports)
    memory.address_space("nothing", memory.container("void", PAGE_SIZE))
    machine.answer = memory.describe()
    assert inspect() == 0
    assert lines(capsys) == [
        "logging of all RAM: off",
        "",
        "address space io",
        "0000-ffff  io (container, 64.0 KiB)",
        "└── 03f8-03ff  serial (mmio, 8 B)",
        "",
        "addresses  kind  region + offset  logged (dirty pages)",
        "3f8-3ff    mmio  serial",
        "",
        "address space nothing",
        "000-fff  void (container, 4.0 KiB)",
        "",
        "nothing is shown",
    ]


def test_json_is_the_description(machine: Machine, inspect: Inspect, pc: Memory, capsys: Capture) -> None:
    machine.answer = pc.describe()
    assert inspect("--json") == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=MemoryDescription) == machine.answer


_CHARACTERS: Final = st.characters(codec="utf-8", exclude_characters="…")
_TEXT: Final = st.text(_CHARACTERS, max_size=8) | st.sampled_from(("\x1b[31mred", "[bold]", "two\nlines", "a" * 100))
_SIZES: Final = st.integers(1, 1 << 64)
_OFFSETS: Final = st.integers(0, (1 << 64) - 1)
_ADDRESSES: Final = st.integers(0, (1 << 65) - 1)
_LOGGING: Final = st.lists(_TEXT, max_size=2).map(tuple)
_ANY_RANGE: Final = st.builds(
    RangeDescription,
    start=_ADDRESSES,
    size=_SIZES,
    region=_TEXT,
    kind=_TEXT,
    offset=_OFFSETS,
    logging=_LOGGING,
    dirty=st.dictionaries(_TEXT, st.integers(0, 1 << 60), max_size=2),
)


def _region(children: st.SearchStrategy[tuple[RegionDescription, ...]]) -> st.SearchStrategy[RegionDescription]:
    target = st.none() | _TEXT
    return st.builds(
        RegionDescription,
        name=_TEXT,
        kind=_TEXT,
        address=_ADDRESSES,
        size=_SIZES,
        target=target,
        target_offset=_OFFSETS,
        children=children,
    )


_NO_REGIONS: Final[tuple[RegionDescription, ...]] = ()
_ANY_REGION: Final = st.recursive(
    _region(st.just(_NO_REGIONS)), lambda inner: _region(st.lists(inner, max_size=2).map(tuple)), max_leaves=6
)
_ANY_SPACE: Final = st.builds(
    AddressSpaceDescription,
    name=_TEXT,
    root=st.none() | _ANY_REGION,
    ranges=st.lists(_ANY_RANGE, max_size=3).map(tuple),
)


@pytest.mark.parametrize("columns", ["40", "80"])
def test_whatever_a_machine_describes_can_be_shown_and_does_nothing_to_a_terminal(
    machine: Machine, inspect: Inspect, capsys: Capture, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)

    @given(st.builds(MemoryDescription, address_spaces=st.lists(_ANY_SPACE, max_size=2).map(tuple)))
    def check(described: MemoryDescription) -> None:
        machine.answer = described
        assert inspect() == 0
        out = capsys.readouterr().out
        assert "…" not in out
        assert all(line.isprintable() for line in out.split("\n"))

    check()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"address_spaces": 1, "tracking": []},
        {"address_spaces": [{"name": "x", "root": None}], "tracking": []},
        [],
    ],
)
def test_other_words_are_refused(machine: Machine, inspect: Inspect, capsys: Capture, answer: Any) -> None:
    machine.answer = answer
    assert inspect() == 5
    assert "describes its memory in other words" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, -1, (1 << 64) + 1, 10**400], ids=["none", "less", "more", "huge"])
def test_impossible_size_is_refused(machine: Machine, inspect: Inspect, capsys: Capture, size: int) -> None:
    machine.answer = MemoryDescription((AddressSpaceDescription("memory", None, (far(size=size),)),), ())
    assert inspect() == 5
    assert f"tells of {size} bytes of memory in one piece" in capsys.readouterr().err


def test_refusal_of_the_machine_is_passed_on(machine: Machine, inspect: Inspect, capsys: Capture) -> None:
    machine.answer = UsageError("not today")
    assert inspect() != 0
    assert "not today" in capsys.readouterr().err


def test_absent_machine_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    assert main(["inspect", str(tmp_path / "nobody")]) != 0
    assert str(tmp_path / "nobody") in capsys.readouterr().err


def test_help_says_what_is_shown(capsys: Capture) -> None:
    assert main(["inspect", "--help"]) == 0
    out = capsys.readouterr().out
    for word in ("QMP_PATH", "--json", "tree of regions", "flat view", "dirty"):
        assert word in out


def test_running_machine_shows_its_ram_and_ports(kvm: object, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(build(1 * MIB, 2 * MIB))
    with Run(tmp_path / "qmp", str(image), "--memory", "16M"), dirtylog("inspect", str(tmp_path / "qmp")) as shown:
        assert shown.wait() == 0, shown.err
        out = shown.out.splitlines()
        assert out[0] == "logging of all RAM: off"
        assert any(line.startswith("address space ") for line in out)
        assert any("000000-ffffff" in line and "ram" in line for line in out)
        assert any("3f8-" in line and "serial" in line for line in out)
        with dirtylog("inspect", str(tmp_path / "qmp"), "--json") as described:
            assert described.wait() == 0, described.err
            spaces = json.loads(described.out)["address_spaces"]
            assert [part["size"] for part in spaces[0]["ranges"] if part["kind"] == "ram"] == [16 * MIB]
            assert all(part["dirty"] == {} for part in spaces[0]["ranges"])
