"""A map of memory: which parts were written how long ago, and how much of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from dirtylog.cli.text import printable
from dirtylog.display import WriteHistory
from dirtylog.units import PAGE_SIZE, format_size

WINDOWS: Final = (1.0, 10.0, 60.0)
"""Seconds, for which the map has colours and the figures tell the working set."""

_COLOURS: Final = ("bright_red", "dark_orange", "yellow3", "steel_blue")
"""Of cells last written within each window, and earlier."""
_NEVER_COLOUR: Final = "grey42"
_SHADES: Final = "░▒▓█"
_PLAIN_SHADES: Final = "-+x#"
_NEVER: Final = "·"
_PLAIN_NEVER: Final = "."
_COLUMN_STEP: Final = 16


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which blocks are shown, and in cells of what size."""

    blocks: dict[str, int]
    cell_pages: int
    columns: int


class HeatMap:
    """A map as large as the console lets it be.

    A cell's colour says how long ago the latest write to any of its pages was; its shade, how many of its pages were
    written within that time.

    Args:
        history: what is shown.
        reserved: lines of the console that are left to others.
    """

    def __init__(self, history: WriteHistory, reserved: int) -> None:
        self._history = history
        self._reserved = reserved

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = options.ascii_only
        height = (options.height or console.height) - self._reserved
        layout = _lay_out(self._history.blocks, options.max_width, height)
        yield from _legend(layout.cell_pages, plain=plain)
        for name, pages in layout.blocks.items():
            yield Text()
            yield from self._block(name, pages, layout, plain=plain)
        left_out = len(self._history.blocks) - len(layout.blocks)
        if left_out:
            yield Text(f"{left_out} smaller blocks are not shown", "dim", no_wrap=True)

    def _block(self, name: str, pages: int, layout: _Layout, *, plain: bool) -> Iterator[Text]:
        counts = self._history.count_cells(name, layout.cell_pages, WINDOWS)
        written = format_size(int(counts[:, -1].sum()) * PAGE_SIZE)
        yield _line().append(printable(name), "bold").append(f"  {written} of {format_size(pages * PAGE_SIZE)} written")
        digits = _digits(pages)
        for first in range(0, len(counts), layout.columns):
            line = _line().append(f"{first * layout.cell_pages * PAGE_SIZE:0{digits}x} ", "dim")
            for cell, row in enumerate(counts[first : first + layout.columns].tolist(), first):
                size = min(layout.cell_pages, pages - cell * layout.cell_pages)
                line.append(*_cell(row, size, plain=plain))
            yield line


def _cell(counts: list[int], pages: int, *, plain: bool) -> tuple[str, str]:
    """A cell's character and colour: ``counts`` are as `WriteHistory.count_cells` gives them."""
    for count, colour in zip(counts, _COLOURS, strict=True):
        if count:
            shades = _PLAIN_SHADES if plain else _SHADES
            return shades[(count * len(shades) - 1) // pages], colour
    return _PLAIN_NEVER if plain else _NEVER, _NEVER_COLOUR


def _legend(cell_pages: int, *, plain: bool) -> Iterator[Text]:
    shades, never = (_PLAIN_SHADES, _PLAIN_NEVER) if plain else (_SHADES, _NEVER)
    colours = _line().append("last written within")
    ages = [f"{window:.0f} s" for window in WINDOWS] + ["longer ago"]
    for age, colour in zip(ages, _COLOURS, strict=True):
        colours.append(f"  {shades[-1]} ", colour).append(age, "dim")
    yield colours.append(f"  {never} ", _NEVER_COLOUR).append("never", "dim")
    parts = _line().append("part written then")
    for number, shade in enumerate(shades, 1):
        parts.append(f"  {shade} ").append(f"{100 * number // len(shades)} %", "dim")
    yield parts.append(f"  of a cell of {format_size(cell_pages * PAGE_SIZE)}", "dim")


def _lay_out(blocks: Mapping[str, int], width: int, height: int) -> _Layout:
    """The smallest cells with which all fits; if there are too many blocks for that, the largest of them."""
    room = max(4, height - 3)  # the legend, and what is said of blocks left out
    largest = sorted(blocks, key=lambda name: blocks[name], reverse=True)[: max(1, room // 3)]
    shown = {name: pages for name, pages in blocks.items() if name in largest}
    label = max(map(_digits, shown.values()), default=1) + 1
    columns = max(_COLUMN_STEP, (width - label) // _COLUMN_STEP * _COLUMN_STEP)
    cell_pages = 1
    while sum(2 + -(-pages // (cell_pages * columns)) for pages in shown.values()) > room:
        if cell_pages >= max(shown.values(), default=0):
            break  # the console is too low for even that
        cell_pages *= 2
    return _Layout(shown, cell_pages, columns)


def _line() -> Text:
    return Text(no_wrap=True, overflow="crop")


def _digits(pages: int) -> int:
    """How many hexadecimal digits the offsets in a block have."""
    return len(f"{pages * PAGE_SIZE - 1:x}")
