"""``dirtylog inspect``: the memory of a running machine."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from dirtylog.cli.text import printable
from dirtylog.control.qmp import QMPClient
from dirtylog.errors import ProtocolError
from dirtylog.memory.description import (
    AddressSpaceDescription,
    MemoryDescription,
    RangeDescription,
    RegionDescription,
)
from dirtylog.memory.flatview import ADDRESS_SPACE_SIZE
from dirtylog.units import format_size

_ANY_WIDTH: Final = 10_000


@click.command("inspect")
@click.argument("qmp_path")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(qmp_path: str, as_json: bool) -> None:
    """Show the memory of the machine whose QMP socket is QMP_PATH.

    For each address space: the tree of regions as it was built, those that hide others first, and the flat view, which
    is what an access finds. With each range: which clients log it, and how many of its pages are dirty for each, as far
    as the log was collected.
    """
    with QMPClient(qmp_path) as qmp:
        reply: dict[str, Any] = qmp.execute("x-query-memory")
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(reply)).decode())
        return
    try:
        memory = msgspec.convert(reply, MemoryDescription)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ProtocolError(f"the machine at {qmp_path} describes its memory in other words: {error}") from error
    _check(memory, qmp_path)
    console = Console(highlight=False, emoji=False, markup=False)
    console.print(printable(f"logging of all RAM: {', '.join(memory.tracking) or 'off'}"))
    for space in memory.address_spaces:
        _show(console, space)


def _check(memory: MemoryDescription, qmp_path: str) -> None:
    """Refuse numbers that nothing has, before they are computed with."""
    for space in memory.address_spaces:
        shown = [(part.start, part.offset, part.size) for part in space.ranges]
        built = [(region.address, region.target_offset, region.size) for region in _all_regions(space.root)]
        for address, offset, size in (*shown, *built):
            if not (0 <= address < 2 * ADDRESS_SPACE_SIZE and 0 <= offset < ADDRESS_SPACE_SIZE):
                raise ProtocolError(f"the machine at {qmp_path} tells of memory at an address that there is not")
            if not 0 < size <= ADDRESS_SPACE_SIZE:
                raise ProtocolError(f"the machine at {qmp_path} tells of {size} bytes of memory in one piece")
        if any(pages < 0 for part in space.ranges for pages in part.dirty.values()):
            raise ProtocolError(f"the machine at {qmp_path} tells of fewer dirty pages than none")


def _all_regions(root: RegionDescription | None) -> Iterator[RegionDescription]:
    if root is not None:
        yield root
        for child in root.children:
            yield from _all_regions(child)


def _show(console: Console, space: AddressSpaceDescription) -> None:
    console.print()
    console.print(Text(f"address space {printable(space.name)}", "bold"))
    if space.root is not None:
        ends = [region.address + region.size for region in _all_regions(space.root)]
        digits = _digits([end for end in ends if end != ADDRESS_SPACE_SIZE])
        console.print(_tree(space.root, digits))
    console.print()
    if not space.ranges:
        console.print("nothing is shown")
        return
    wide = _view(space.ranges, clients_beside=True)
    fits = console.measure(wide, options=console.options.update(max_width=_ANY_WIDTH)).maximum <= console.width
    console.print(wide if fits else _view(space.ranges, clients_beside=False))


def _tree(region: RegionDescription, digits: int, above: Tree | None = None) -> Tree:
    label = _table()
    label.add_row(_addresses(region.address, region.size, digits), _about(region))
    style = "" if region.enabled else "dim"
    tree = Tree(label, style=style) if above is None else above.add(label, style=style)
    for child in region.children:
        _tree(child, digits, tree)
    return tree


def _about(region: RegionDescription) -> Text:
    facts = [region.kind]
    if region.target is not None:
        facts = [f"alias of {region.target} from {region.target_offset:#x}"]
    if region.size < ADDRESS_SPACE_SIZE:
        facts.append(format_size(region.size))
    if region.priority:
        facts.append(f"priority {region.priority}")
    if region.readonly and region.kind != "rom":
        facts.append("read-only")
    if not region.enabled:
        facts.append("disabled")
    return Text(printable(f"{region.name} ({', '.join(facts)})"))


def _view(ranges: Sequence[RangeDescription], *, clients_beside: bool) -> Table:
    """A row a range. Who logs it has a column, or else lines below the range's name: these are shorter then."""
    headers = ("region + offset", "logged (dirty pages)")
    table = _table("addresses", "kind", *(headers if clients_beside else ["\n  ".join(headers)]))
    digits = _digits([part.start + part.size for part in ranges])
    for part in ranges:
        kind = printable(f"{part.kind}, read-only" if part.readonly and part.kind != "rom" else part.kind)
        name = printable(f"{part.region} + {part.offset:#x}" if part.offset else part.region)
        logged = [f"{printable(client)} ({part.dirty.get(client, 0):,})" for client in part.logging]
        cells = [name, ", ".join(logged)] if clients_beside else ["\n  ".join([name, *logged])]
        table.add_row(_addresses(part.start, part.size, digits), *map(Text, (kind, *cells)))
    return table


def _table(*headers: str) -> Table:
    """Addresses, which are never cut, and other columns, which are wrapped where they do not fit."""
    table = Table(box=None, show_header=bool(headers), pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(*headers[:1], no_wrap=True, overflow="fold")
    for header in headers[1:] or ("",):
        table.add_column(header, overflow="fold")
    return table


def _addresses(start: int, size: int, digits: int) -> Text:
    return Text(f"{start:0{digits}x}-{start + size - 1:0{digits}x}")


def _digits(ends: Sequence[int]) -> int:
    """How many digits the addresses up to some ends have; the same for all, so that they can be compared."""
    return max((len(f"{end - 1:x}") for end in ends), default=1)
