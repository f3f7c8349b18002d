"""A migration's verdict in words: will it end, when, at what downtime, and what would help."""

import math

from dirtylog.control.migration_info import MigrationInfo, VerdictInfo
from dirtylog.units import format_duration, format_rate


def verdict_text(info: MigrationInfo) -> str:
    """What is to be expected of a migration under way."""
    verdict = info.x_verdict
    if verdict is None or verdict.converges is None:
        return "it is too early to tell whether it converges"
    downtime = "" if verdict.downtime is None else f", with a downtime of {format_duration(verdict.downtime)}"
    if verdict.converges and not verdict.seconds:
        return f"it converges now{downtime}"
    if verdict.converges:
        return f"it will converge in {format_duration(verdict.seconds or 0.0)}{downtime}"
    throttled = info.cpu_throttle_percentage
    if throttled is None:
        return f"it will never converge as it is{_help(verdict, 0)}"
    return f"it does not converge at a throttle of {throttled} %{_help(verdict, throttled)}"


def _help(verdict: VerdictInfo, throttled: int) -> str:
    needs = []
    if verdict.needed_limit is not None:
        needs.append(f"a downtime limit of {format_duration(verdict.needed_limit)}")
    if verdict.needed_bandwidth is not None:
        needs.append(f"a bandwidth of {format_rate(verdict.needed_bandwidth)}")
    if math.floor(verdict.needed_throttle) > throttled:
        needs.append(f"a throttle of more than {math.floor(verdict.needed_throttle)} %")
    if not needs:
        return ""
    *others, last = needs
    return f": it takes {', '.join(others) + ' or ' if others else ''}{last}"
