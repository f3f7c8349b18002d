import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog import units
from dirtylog.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1K", 1024),
        ("512M", 512 << 20),
        ("1G", 1 << 30),
        ("2T", 2 << 40),
        ("1.5GiB", 3 << 29),
        ("64kb", 64 << 10),
        (" 8 MiB ", 8 << 20),
        ("18014398509481984K", 1 << 64),
    ],
)
def test_size_is_read(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1e3", "1 2", "4096 pages", "1Q", "0x1000", "1.M", "∞"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        units.parse_size(text)
    assert caught.value.remedy is not None
    assert "512M" in caught.value.remedy


@pytest.mark.parametrize("text", ["1.5", "0.3K", "1.0001K"])
def test_part_of_a_byte_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a whole number of bytes"):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1G", 1 << 30),
        ("128M/s", 128 << 20),
        ("128MiB/s", 128 << 20),
        ("10Gbit", 1_250_000_000),
        ("10 gbit/s", 1_250_000_000),
        ("8bps", 1),
        ("1.5Mbit", 187_500),
    ],
)
def test_rate_is_read(text: str, rate: int) -> None:
    assert units.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "1G/min", "-1M", "Gbit"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a rate"):
        units.parse_rate(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("300ms", 0.3), ("2s", 2.0), ("1.5min", 90.0), ("1m", 60.0), ("1h", 3600.0), ("20 us", 2e-5)]
)
def test_duration_is_read(text: str, seconds: float) -> None:
    assert math.isclose(units.parse_duration(text), seconds)


@pytest.mark.parametrize("text", ["", "300", "ms", "-1s", "1 day", "1s2ms"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        units.parse_duration(text)


@given(st.integers(0, 1 << 64), st.integers(1, 1 << 32))
def test_alignment_brackets_the_value(value: int, alignment: int) -> None:
    down, up = units.align_down(value, alignment), units.align_up(value, alignment)
    assert down % alignment == up % alignment == 0
    assert down <= value <= up
    assert up - down in (0, alignment)


@given(st.integers(0, 1 << 20), st.integers(1, 1 << 16))
def test_page_span_is_the_pages_of_all_bytes(offset: int, size: int) -> None:
    first, count = units.page_span(offset, size)
    pages = {byte // units.PAGE_SIZE for byte in (*range(offset, offset + size, units.PAGE_SIZE), offset + size - 1)}
    assert (first, first + count - 1) == (min(pages), max(pages))


@pytest.mark.parametrize(("pages", "words"), [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2)])
def test_words_hold_a_bit_for_each_page(pages: int, words: int) -> None:
    assert units.word_count(pages) == words


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (4096, "4.0 KiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 60, "1.0 EiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_size_is_written(size: int, text: str) -> None:
    assert units.format_size(size) == text


def test_rate_is_written() -> None:
    assert units.format_rate(1288490189) == "1.2 GiB/s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 us"), (250e-6, "250 us"), (0.0123, "12.3 ms"), (1.25, "1.25 s"), (600, "600.00 s")]
)
def test_duration_is_written(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text


@given(st.integers(0, 1 << 60))
def test_written_size_reads_back_within_its_precision(size: int) -> None:
    number, unit = units.format_size(size).split()
    factor = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "PiB": 1 << 50, "EiB": 1 << 60}[
        unit
    ]
    assert abs(float(number) * factor - size) <= factor * 0.05 + size * 1e-12
