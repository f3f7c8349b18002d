"""Types of options that carry a unit, and the text that their help shows."""

from collections.abc import Callable
from typing import Any, Final

import click

from dirtylog.errors import UsageError
from dirtylog.units import parse_duration, parse_rate, parse_size


class UnitType(click.ParamType):  # type: ignore[type-arg]  # generic only in recent releases of click
    """An option's type whose text one of the parsers of `dirtylog.units` understands.

    Args:
        name: shown in capitals where the help names the value.
        parse: from text to a number, or what else it stands for; raises UsageError.
    """

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number that the text stands for; a default that is a number already stays as it is."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


def parse_address(text: str) -> int:
    """An address: hexadecimal after ``0x``, or as a size."""
    digits = text.strip().lower()
    if not digits.startswith("0x"):
        return parse_size(text)
    try:
        return int(digits, 16)
    except ValueError as error:
        raise UsageError(f"{text!r} is not an address", remedy="write one like 0x7c00, 31K or 1M") from error


ADDRESS: Final = UnitType("address", parse_address)
SIZE: Final = UnitType("size", parse_size)
RATE: Final = UnitType("rate", parse_rate)
DURATION: Final = UnitType("duration", parse_duration)
