"""Page and address arithmetic, and the units that people type and read."""

import re
from typing import Final

from dirtylog.errors import UsageError

PAGE_SIZE: Final = 4096
HUGE_PAGE_SIZE: Final = 1 << 21
"""What one entry of an x86 page directory maps."""
WORD_BITS: Final = 64
"""Dirty bitmaps are 64-bit words, as KVM's are; many interfaces want ranges of whole words."""

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

_BINARY = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50, "E": 1 << 60}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTPE]?)(?:iB|B)?", re.IGNORECASE)
_BIT_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:bit(?:/s)?|bps)", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|min|m|h)", re.IGNORECASE)


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of ``alignment`` that is at most ``value``."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` that is at least ``value``."""
    return -(-value // alignment) * alignment


def page_span(offset: int, size: int) -> tuple[int, int]:
    """The first page of a byte range and how many pages it touches: partial pages count whole, no bytes touch none."""
    first = offset // PAGE_SIZE
    return first, -(-(offset + size) // PAGE_SIZE) - first if size else 0


def word_count(pages: int) -> int:
    """How many 64-bit words hold one bit for each of ``pages`` pages."""
    return -(-pages // WORD_BITS)


def parse_size(text: str) -> int:
    """Bytes from ``4096``, ``512M``, ``1G``, ``1.5GiB``; prefixes are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size", remedy="write one like 4096, 512M or 1G")
    return _whole(text, match[1], _BINARY[match[2].upper()], "bytes")


def parse_rate(text: str) -> int:
    """Bytes a second from ``1G`` or ``128M/s`` (powers of 1024), or from ``10Gbit`` (decimal bits)."""
    stripped = text.strip()
    match = _BIT_RATE.fullmatch(stripped)
    if match is not None:
        return int(float(match[1]) * _DECIMAL[match[2].upper()]) // 8
    match = _SIZE.fullmatch(stripped.removesuffix("/s"))
    if match is None:
        raise UsageError(f"{text!r} is not a rate", remedy="write one like 128M (bytes a second) or 10Gbit")
    return _whole(text, match[1], _BINARY[match[2].upper()], "bytes a second")


def parse_duration(text: str) -> float:
    """Seconds from ``300ms``, ``2s`` or ``1.5min``; a number without a unit is not accepted."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a duration", remedy="write one like 300ms, 2s or 1min")
    return float(match[1]) * _SECONDS[match[2].lower()]


def _whole(text: str, number: str, factor: int, what: str) -> int:
    value = float(number) * factor if "." in number else int(number) * factor
    if value != int(value):
        raise UsageError(f"{text!r} is not a whole number of {what}")
    return int(value)


def format_size(size: float) -> str:
    """Bytes for people: ``4.0 KiB``, ``1.5 GiB``."""
    for prefix in ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"):
        if abs(size) < 1024 or prefix == "Ei":
            break
        size /= 1024
    return f"{size:.0f} B" if prefix == "" else f"{size:.1f} {prefix}B"


def format_rate(rate: float) -> str:
    """Bytes a second for people: ``1.2 GiB/s``."""
    return f"{format_size(rate)}/s"


def format_duration(seconds: float) -> str:
    """Seconds for people: ``250 us``, ``12.3 ms``, ``1.25 s``."""
    if abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s"
