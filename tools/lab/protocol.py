"""What the two sides say to each other: an order in the initramfs, and events, a line each, over a serial port."""

from typing import Final

from msgspec import Struct

ORDER: Final = "/lab/order.json"


class Order(Struct, frozen=True):
    """What the guest is to do.

    Attributes:
        command: a program with its arguments.
        directory: where it starts.
        environment: all of its.
        modules: the kernel modules to load, in order.
    """

    command: list[str]
    directory: str
    environment: dict[str, str]
    modules: list[str]


class Started(Struct, frozen=True, tag="started"):
    """A test begins."""

    test: str


class Finished(Struct, frozen=True, tag="finished"):
    """A test, or reading a file of tests, came to an end.

    Attributes:
        test: its name in pytest.
        outcome: ``passed``, ``failed`` or ``skipped``.
        seconds: how long it took.
        reason: why it was skipped or failed, in a line.
    """

    test: str
    outcome: str
    seconds: float
    reason: str


class Ended(Struct, frozen=True, tag="ended"):
    """The command ended: nothing comes after this.

    Attributes:
        status: its exit status; a signal's number, negative, where that ended it.
    """

    status: int


Event = Started | Finished | Ended
