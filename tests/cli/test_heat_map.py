import io
from collections.abc import Mapping
from typing import Final

import pytest
from rich.console import Console
from rich.segment import Segment
from support.oracles import to_words

from dirtylog.cli.heat_map import HeatMap
from dirtylog.display import Sample, WriteHistory
from dirtylog.memory import PageBitmap
from dirtylog.units import GIB, MIB, PAGE_SIZE

BLOCKS: Final = {"ram": 1024}


class ASCII(io.StringIO):
    encoding = "ascii"


def console(width: int, height: int, *, ascii_only: bool = False) -> Console:
    file = ASCII() if ascii_only else io.StringIO()
    return Console(
        file=file,
        width=width,
        height=height,
        force_terminal=True,
        color_system="256",
        legacy_windows=False,
        _environ={},
    )


def history(blocks: Mapping[str, int], *written: set[int], block: str = "ram", seconds: float = 1.0) -> WriteHistory:
    made = WriteHistory(blocks)
    for number, pages in enumerate(written, 1):
        bitmaps = {name: PageBitmap(count) for name, count in blocks.items()}
        bitmaps[block] = PageBitmap(blocks[block], to_words(pages, blocks[block]))
        made.add(Sample(number * seconds, seconds, bitmaps))
    return made


def lines(made: WriteHistory, width: int = 80, height: int = 24, *, ascii_only: bool = False) -> list[str]:
    where = console(width, height, ascii_only=ascii_only)
    rendered = where.render_lines(HeatMap(made, 4), pad=False)
    return ["".join(segment.text for segment in line) for line in rendered]


def cells(made: WriteHistory, width: int = 80, height: int = 24) -> list[Segment]:
    """The cells of the first row of the map."""
    rendered = console(width, height).render_lines(HeatMap(made, 4), pad=False)
    return [Segment(character, segment.style) for segment in rendered[4][1:] for character in segment.text]


def test_map_of_a_small_memory_has_a_cell_for_each_page() -> None:
    assert lines(history(BLOCKS, {0, 1, 65, 1023}))[:6] == [
        "last written within  █ 1 s  █ 10 s  █ 60 s  █ longer ago  · never",
        "part written then  ░ 25 %  ▒ 50 %  ▓ 75 %  █ 100 %  of a cell of 8.0 KiB",
        "",
        "ram  16.0 KiB of 4.0 MiB written",
        "000000 █" + "·" * 31 + "▒" + "·" * 31,
        "080000 " + "·" * 64,
    ]


def test_terminal_without_the_characters_gets_others() -> None:
    shown = lines(history(BLOCKS, {0, 1, 65, 1023}), ascii_only=True)
    assert shown[4] == "000000 #" + "." * 31 + "+" + "." * 31
    assert "".join(shown).isascii()


def test_shade_is_the_part_of_the_cell_that_was_written() -> None:
    whole = 4 * 1024
    made = history({"ram": whole}, {0, 8, 9, 10, 16, 17, 18, 19, 20, *range(24, 32)})
    shown = [segment.text for segment in cells(made)]
    assert lines(made)[1].endswith("of a cell of 32.0 KiB")
    assert shown[:5] == ["░", "▒", "▓", "█", "·"]


def test_last_cell_may_be_shorter_and_still_be_full() -> None:
    made = history({"ram": 4 * 1024 + 3}, set(range(4 * 1024, 4 * 1024 + 3)))
    assert lines(made, height=30)[-1].endswith("█")


def test_colour_is_how_long_ago_the_latest_write_was() -> None:
    samples: list[set[int]] = [set() for _ in range(70)]
    samples[0], samples[30], samples[65], samples[69] = {0}, {2}, {4}, {6, 0}
    shown = cells(history(BLOCKS, *samples))
    colours = [segment.style.color.name for segment in shown[:5] if segment.style and segment.style.color]
    assert colours == ["bright_red", "yellow3", "dark_orange", "bright_red", "grey42"]


def test_cell_that_cooled_down_stays_visible() -> None:
    shown = cells(history(BLOCKS, {0}, *(set[int]() for _ in range(100))))
    assert shown[0].text == "▒"
    assert shown[0].style
    assert shown[0].style.color
    assert shown[0].style.color.name == "steel_blue"


@pytest.mark.parametrize("width", [20, 40, 80, 133, 250])
@pytest.mark.parametrize("height", [14, 24, 60])
@pytest.mark.parametrize(
    "blocks",
    [
        {"ram": 1},
        {"ram": 65},
        {"ram": 128 * MIB // PAGE_SIZE, "bios": 64, "vram": 4096},
        {"ram": 256 * GIB // PAGE_SIZE},
        {"ram": 100, **{f"block{number}": number + 1 for number in range(40)}},
    ],
    ids=["page", "65", "pc", "256G", "many"],
)
def test_map_fits_the_terminal(blocks: dict[str, int], width: int, height: int) -> None:
    shown = lines(WriteHistory(blocks), width, height)
    assert len(shown) <= height - 4
    assert max(map(len, shown)) <= width
    assert any(line.startswith("ram  0 B of") for line in shown)


def test_blocks_that_do_not_fit_are_counted_and_are_the_smallest() -> None:
    blocks = {"ram": 100, **{f"block{number}": number + 1 for number in range(40)}}
    shown = lines(WriteHistory(blocks), 80, 24)
    assert shown[-1].endswith("smaller blocks are not shown")
    assert any(line.startswith("block39 ") for line in shown)
    assert not any(line.startswith("block0 ") for line in shown)


def test_name_of_a_block_does_nothing_to_the_terminal() -> None:
    shown = lines(WriteHistory({"\x1b[2J[bold]": 1}))
    assert shown[3].startswith("\\x1b[2J[bold]  0 B")
