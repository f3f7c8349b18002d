"""The programs that are compared. All that differs between them is here."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

import dirtylog
from benchmarks.support.guest import STARTUP_SECONDS, Files, Guest
from dirtylog.control.commands import PassInfo
from dirtylog.errors import HostError, ProtocolError
from dirtylog.units import MIB

QEMU_PROGRAM: Final = "qemu-system-x86_64"
_UNHAMPERED: Final = 1 << 40  # bytes a second; QEMU sends 128 MiB/s at most unless told otherwise


@dataclass(frozen=True, slots=True)
class Launch:
    """How one side of a migration is to be started.

    Attributes:
        image: what to boot.
        memory: bytes of the guest's RAM, whole MiB.
        incoming: where to wait for a guest, or None to boot.
    """

    image: Path
    memory: int
    incoming: str | None = None


class Peer(Protocol):
    """A program that runs and migrates guests, and speaks QMP.

    Attributes:
        name: what the table calls it.
        version: the program's own.
    """

    name: str
    version: str

    def command(self, launch: Launch, files: Files) -> list[str]:
        """The program and its arguments."""

    def address(self, destination: Guest, uri: str) -> str:
        """Where a destination waits that was told ``uri``, in which a TCP port may be 0."""

    def prepare(self, source: Guest, limit: float) -> None:
        """Set a source up: no limit to its speed, ``limit`` seconds of downtime, an event for each change of status."""

    def downtime(self, info: dict[str, Any]) -> float:
        """Seconds, as query-migrate has them."""

    def each_pass(self, info: dict[str, Any]) -> list[PassInfo]:
        """What query-migrate tells of each pass, if anything."""


class QEMU:
    """Debian's QEMU, or whichever the PATH has."""

    name = "QEMU"

    def __init__(self) -> None:
        if shutil.which(QEMU_PROGRAM) is None:
            raise HostError(
                f"there is no {QEMU_PROGRAM}", remedy="install Debian's qemu-system-x86, or use 'make bench'"
            )
        shown = subprocess.run(
            [QEMU_PROGRAM, "--version"], capture_output=True, text=True, check=True, timeout=STARTUP_SECONDS
        ).stdout
        found = re.search(r"version (\S+)", shown)
        self.version = found[1] if found else "of unknown version"

    def command(self, launch: Launch, files: Files) -> list[str]:
        """The image is opened as a snapshot's base, which source and destination may share."""
        incoming = [] if launch.incoming is None else ["-incoming", launch.incoming]
        # A comma within an option's value is written twice.
        image, serial, qmp = (str(path).replace(",", ",,") for path in (launch.image, files.serial, files.qmp))
        return [
            *(QEMU_PROGRAM, "-accel", "kvm", "-cpu", "qemu64", "-m", f"{launch.memory // MIB}M"),
            *("-nodefaults", "-display", "none", "-serial", f"file:{serial}"),
            *("-drive", f"file={image},format=raw,if=ide,snapshot=on"),
            *("-qmp", f"unix:{qmp},server=on,wait=off"),
            *incoming,
        ]

    def address(self, destination: Guest, uri: str) -> str:
        """QEMU tells the port that it got."""
        if not uri.startswith("tcp:"):
            return uri
        address = destination.qmp.execute("query-migrate")["socket-address"][0]
        return f"tcp:{address['host']}:{address['port']}"

    def prepare(self, source: Guest, limit: float) -> None:
        """Its default limit is 128 MiB/s; with 0 it would send nothing."""
        source.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        source.qmp.execute("migrate-set-parameters", max_bandwidth=_UNHAMPERED, downtime_limit=round(limit * 1000))

    def downtime(self, info: dict[str, Any]) -> float:
        """Whole milliseconds, until the source has sent everything; what the destination does after is not in it."""
        return float(info["downtime"]) / 1e3

    def each_pass(self, info: dict[str, Any]) -> list[PassInfo]:
        """It tells sums alone."""
        del info
        return []


class Dirtylog:
    """The dirtylog that this Python imports."""

    name = "dirtylog"
    version = dirtylog.__version__

    def command(self, launch: Launch, files: Files) -> list[str]:
        """A destination needs no image."""
        what = [str(launch.image)] if launch.incoming is None else ["--incoming", launch.incoming]
        return [
            *(sys.executable, "-m", "dirtylog.cli.main", "run", *what, "--memory", str(launch.memory)),
            *("--qmp", str(files.qmp), "--serial", str(files.serial)),
        ]

    def address(self, destination: Guest, uri: str) -> str:
        """It says on standard error where it waits."""
        if not uri.startswith("tcp:"):
            return uri

        def announced() -> str | None:
            found = re.search(r"waiting for a guest at (tcp:\S+)", destination.complaints())
            return None if found is None else found[1]

        return destination.until(announced, STARTUP_SECONDS, "say where it waits")

    def prepare(self, source: Guest, limit: float) -> None:
        """Without a limit unless told otherwise; events come anyway."""
        source.qmp.execute("migrate-set-parameters", max_bandwidth=0, downtime_limit=round(limit * 1000))

    def downtime(self, info: dict[str, Any]) -> float:
        """From before the guest is stopped until the destination says that it starts it."""
        return float(info["x-downtime-us"]) / 1e6

    def each_pass(self, info: dict[str, Any]) -> list[PassInfo]:
        """The last hundred, in order.

        Raises:
            ProtocolError: query-migrate has something else.
        """
        try:
            return msgspec.convert(info.get("x-passes"), list[PassInfo])
        except msgspec.ValidationError as error:
            raise ProtocolError(f"dirtylog does not describe the passes of its migration: {error}") from error
