"""How a migration is shown, from what query-migrate says."""

from collections.abc import Mapping, Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dirtylog.cli.verdict import verdict_text
from dirtylog.control.migration_info import DowntimePartsInfo, MigrationInfo, PassInfo, WayInfo
from dirtylog.units import format_duration, format_rate, format_size

_COLUMNS: Final = ("pass", "pages", "zero", "time", "bandwidth", "dirtied", "expected\ndowntime")
"""They fit into 80 characters with the numbers of a guest of hundreds of GiB."""


_RUNNING: Final = "active"
_PLAIN: Final = "plain"
_WORDS: Final = {
    _PLAIN: "they are",
    "fast": "zstd, fast",
    "thorough": "zstd, thorough",
    "delta": "differences",
}
"""What is said of each way of sending."""


def progress_table(info: MigrationInfo) -> RenderableType:
    """How a migration stands, a fact a line."""
    facts = _facts(*_progress(info))
    return Group(facts, Text(), Text(verdict_text(info))) if info.status == _RUNNING else facts


def progress_line(info: MigrationInfo) -> str:
    """How a migration stands, on one line."""
    verdict = [verdict_text(info)] if info.status == _RUNNING else []
    return "  ".join([f"{name} {value}" for name, value in _progress(info)] + verdict)


def _progress(info: MigrationInfo) -> list[tuple[str, str]]:
    ram, expected = info.ram, info.expected_downtime
    facts = [
        ("status", info.status),
        ("pass", f"{ram.dirty_sync_count:,}"),
        ("pages left", f"{ram.remaining // ram.page_size:,}"),
        ("dirty rate", format_rate(ram.dirty_pages_rate * ram.page_size)),
        ("bandwidth", format_rate(ram.mbps * 1e6 / 8)),
        ("expected downtime", "not known yet" if expected is None else format_duration(expected / 1000)),
        ("sent", format_size(ram.transferred)),
        ("elapsed", format_duration(info.total_time / 1000)),
    ]
    if info.cpu_throttle_percentage is not None:
        facts.append(("throttle", f"{info.cpu_throttle_percentage} %"))
    return facts


def report(info: MigrationInfo) -> RenderableType:
    """What a completed migration did: a row a pass, and the totals."""
    totals = [
        ("total time", format_duration(info.total_time / 1000)),
        ("pages sent", f"{info.ram.normal:,}"),
        ("zero pages", f"{info.ram.duplicate:,}"),
        ("bytes", format_size(info.ram.transferred)),
    ]
    if info.x_downtime_us is not None:
        totals.insert(1, ("downtime", format_duration(info.x_downtime_us / 1e6)))
    if info.ram.postcopy_bytes:
        totals.append(("sent after the handover", format_size(info.ram.postcopy_bytes)))
        totals.append(("pages it waited for", f"{info.ram.postcopy_requests:,}"))
    throttle = max((one.throttle for one in info.x_passes), default=0)
    if throttle:
        totals.append(("highest throttle", f"{throttle} %"))
    whole = Text("memory was handed over whole, and not copied")
    parts: list[RenderableType] = [_passes(info.x_passes) if info.x_passes else whole, Text(), _facts(*totals)]
    if info.x_downtime_parts is not None:
        parts += [Text("\nthe downtime went by as"), _facts(*_downtime_parts(info.x_downtime_parts))]
    if info.x_ways.keys() - {_PLAIN}:
        parts += [Text("\npages with contents were sent"), _ways(info.x_ways)]
    if info.x_digests is not None and info.x_verify_us is not None:
        seconds = format_duration(info.x_verify_us / 1e6)
        parts.append(Text(f"\nmemory is equal on both sides; comparing it took {seconds} besides"))
        parts += [Text(f"  {name}  {digest}") for name, digest in info.x_digests.items()]
    return Group(*parts)


def _passes(passes: Sequence[PassInfo]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for one in passes:
        final = one is passes[-1]
        expected = one.expected_downtime
        table.add_row(
            "final" if final else str(one.number),
            f"{one.pages:,}",
            f"{one.zero_pages:,}",
            format_duration(one.seconds),
            format_rate(one.bytes / one.seconds if one.seconds else 0),
            "" if final else f"{one.dirtied:,}",
            "" if expected is None else format_duration(expected),
        )
    return table


def _downtime_parts(parts: DowntimePartsInfo) -> list[tuple[str, str]]:
    microseconds = {
        "  stopping vCPUs": parts.stop,
        "  final pass": parts.final_pass,
        "  state": parts.state,
        "  handover and start": parts.handover,
    }
    return [(name, format_duration(value / 1e6)) for name, value in microseconds.items()]


def _ways(ways: Mapping[str, WayInfo]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("  as")
    for name in ("pages", "bytes", "saved"):
        table.add_column(name, justify="right")
    for name, way in ways.items():
        words = Text(f"  {_WORDS.get(name, name)}")
        table.add_row(words, f"{way.pages:,}", format_size(way.bytes), format_size(way.saved))
    return table


def _facts(*facts: tuple[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in facts:
        table.add_row(name, value)
    return table
