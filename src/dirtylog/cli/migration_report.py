"""How a migration is shown, from what query-migrate says."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dirtylog.units import format_duration, format_rate, format_size


def progress_table(info: dict[str, Any]) -> RenderableType:
    """How a migration stands, a fact a line."""
    return _facts(*_progress(info))


def progress_line(info: dict[str, Any]) -> str:
    """How a migration stands, on one line."""
    return "  ".join(f"{name} {value}" for name, value in _progress(info))


def _progress(info: dict[str, Any]) -> list[tuple[str, str]]:
    ram = info["ram"]
    expected = info.get("expected-downtime")
    return [
        ("status", info["status"]),
        ("pass", str(len(info.get("x-passes", [])))),
        ("pages left", f"{ram['remaining'] // ram['page-size']:,}"),
        ("dirty rate", format_rate(ram["dirty-pages-rate"] * ram["page-size"])),
        ("bandwidth", format_rate(ram["mbps"] * 1e6 / 8)),
        ("expected downtime", "not known yet" if expected is None else format_duration(expected / 1000)),
        ("sent", format_size(ram["transferred"])),
        ("elapsed", format_duration(info["total-time"] / 1000)),
    ]


def report(info: dict[str, Any]) -> RenderableType:
    """What a completed migration did: a row a pass, and the totals."""
    ram = info["ram"]
    totals = _facts(
        ("total time", format_duration(info["total-time"] / 1000)),
        ("downtime", format_duration(info["x-downtime-us"] / 1e6)),
        ("pages sent", f"{ram['normal']:,}"),
        ("zero pages", f"{ram['duplicate']:,}"),
        ("bytes", format_size(ram["transferred"])),
    )
    parts: list[RenderableType] = [_passes(info["x-passes"]), Text(), totals]
    if "x-digests" in info:
        seconds = format_duration(info["x-verify-us"] / 1e6)
        parts.append(Text(f"\nmemory is equal on both sides; comparing it took {seconds} besides"))
        parts += [Text(f"  {name}  {digest}") for name, digest in info["x-digests"].items()]
    return Group(*parts)


def _passes(passes: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("pass", "pages", "zero", "bytes", "time", "bandwidth", "dirtied", "expected\ndowntime"):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for one in passes:
        final = one is passes[-1]
        table.add_row(
            "final" if final else str(one["number"]),
            f"{one['pages']:,}",
            f"{one['zero-pages']:,}",
            format_size(one["bytes"]),
            format_duration(one["seconds"]),
            format_rate(one["bytes"] / one["seconds"] if one["seconds"] else 0),
            "" if final else f"{one['dirtied']:,}",
            "" if final else format_duration(one["expected-downtime"]),
        )
    return table


def _facts(*facts: tuple[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in facts:
        table.add_row(name, value)
    return table
