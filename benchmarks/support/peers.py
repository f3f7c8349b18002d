"""The programs that are compared. All that differs between them is here."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

import dirtylog
from benchmarks.support.guest import STARTUP_SECONDS, Files, Guest
from benchmarks.support.workloads import CONTENTS_ADDRESS, BootFiles
from dirtylog.control.commands import PassInfo
from dirtylog.errors import HostError, ProtocolError
from dirtylog.guests.sector import LOAD_ADDRESS
from dirtylog.migration import Parameters
from dirtylog.units import GIB, MIB

QEMU_PROGRAM: Final = "qemu-system-x86_64"
_UNHAMPERED: Final = 1 << 40  # bytes a second; QEMU sends 128 MiB/s at most unless told otherwise
_HOST_MEMORY: Final = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Launch:
    """How one side of a migration is to be started.

    Attributes:
        files: what to boot.
        memory: bytes of the guest's RAM, whole MiB.
        incoming: where to wait for a guest, in which a TCP port may be 0, or None to boot.
    """

    files: BootFiles
    memory: int
    incoming: str | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """How a guest is to be migrated.

    Attributes:
        limit: seconds of downtime.
        channels: parallel connections.
        bandwidth: bytes a second while the guest runs; 0 for no limit.
    """

    limit: float
    channels: int = 1
    bandwidth: int = 0


class Peer(Protocol):
    """A program that runs and migrates guests, and speaks QMP.

    Attributes:
        name: what the table calls it.
        version: the program's own.
        clear_chunk: bytes whose dirty log it clears at once, right before they are read; 0 if all is cleared when it is
            collected.
        watchable: whether it tells which pages its guest writes.
    """

    name: str
    version: str
    clear_chunk: int
    watchable: bool

    def command(self, launch: Launch, files: Files) -> list[str]:
        """The program and its arguments."""

    def prepare(self, source: Guest, destination: Guest, terms: Terms) -> None:
        """Set both sides up, with an event for each change of status."""

    def address(self, destination: Guest, uri: str) -> str:
        """Where a destination waits that was to wait at ``uri``; it is prepared."""

    def downtime(self, info: dict[str, Any]) -> float:
        """Seconds, as query-migrate has them."""

    def each_pass(self, info: dict[str, Any]) -> list[PassInfo]:
        """What query-migrate tells of each pass, if anything."""


def _value(path: Path) -> str:
    """A path within an option's value, where a comma is written twice."""
    return str(path).replace(",", ",,")


def _contents(files: BootFiles) -> list[str]:
    if files.contents is None:
        return []
    return ["-device", f"loader,file={_value(files.contents)},addr={CONTENTS_ADDRESS:#x},force-raw=on"]


def _memory(size: int) -> list[str]:
    """RAM. The kernel refuses more than the host has unless it is not asked to set it aside."""
    options = ["-m", f"{size // MIB}M"]
    if size > _HOST_MEMORY:
        options += ["-object", f"memory-backend-ram,id=ram,size={size},reserve=off", "-machine", "memory-backend=ram"]
    return options


def _what(launch: Launch) -> list[str]:
    if launch.incoming is not None:
        return ["--incoming", launch.incoming]
    if launch.files.flat is not None:
        return [str(launch.files.flat), "--load-address", hex(LOAD_ADDRESS)]
    return [str(launch.files.image)]


def switch_on(guest: Guest, *capabilities: str) -> None:
    """Have migrations to or from a guest use some capabilities."""
    states = [{"capability": name, "state": True} for name in capabilities]
    guest.qmp.execute("migrate-set-capabilities", capabilities=states)


class QEMU:
    """Debian's QEMU, or whichever the PATH has."""

    name = "QEMU"
    clear_chunk = GIB  # clear-bitmap-shift is 18 by default, counted in pages
    watchable = False

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
        """The image is a snapshot's base, which both sides may share. `address` tells a destination where to wait."""
        return [
            *(QEMU_PROGRAM, "-accel", "kvm", "-cpu", "qemu64", *_memory(launch.memory)),
            *("-nodefaults", "-display", "none", "-serial", f"file:{_value(files.serial)}"),
            *("-drive", f"file={_value(launch.files.image)},format=raw,if=ide,snapshot=on"),
            *("-qmp", f"unix:{_value(files.qmp)},server=on,wait=off"),
            *(_contents(launch.files) if launch.incoming is None else ("-incoming", "defer")),
        ]

    def prepare(self, source: Guest, destination: Guest, terms: Terms) -> None:
        """Its default limit is 128 MiB/s; with 0 it would send nothing."""
        for guest in (source, destination):
            switch_on(guest, "events", *(["multifd"] if terms.channels > 1 else []))
            guest.qmp.execute("migrate-set-parameters", multifd_channels=terms.channels)
        source.qmp.execute(
            "migrate-set-parameters",
            max_bandwidth=terms.bandwidth or _UNHAMPERED,
            downtime_limit=round(terms.limit * 1000),
        )

    def address(self, destination: Guest, uri: str) -> str:
        """QEMU tells the port that it got."""
        destination.qmp.execute("migrate-incoming", uri=uri)
        if not uri.startswith("tcp:"):
            return uri
        address = destination.qmp.execute("query-migrate")["socket-address"][0]
        return f"tcp:{address['host']}:{address['port']}"

    def downtime(self, info: dict[str, Any]) -> float:
        """Whole milliseconds, until the source has sent everything; what the destination does after is not in it."""
        return float(info["downtime"]) / 1e3

    def each_pass(self, info: dict[str, Any]) -> list[PassInfo]:
        """It tells sums alone."""
        del info
        return []


class Dirtylog:
    """The dirtylog that this Python imports.

    Args:
        name: what the table calls it.
        options: of ``dirtylog run``, for source and destination.
        clear_chunk: bytes whose log is cleared at once; 0 if the options have it cleared as it is collected.
        shares: whether memory is handed over whole, and not copied.
    """

    version = dirtylog.__version__
    watchable = True

    def __init__(
        self,
        name: str = "dirtylog",
        options: Sequence[str] = (),
        clear_chunk: int = Parameters().clear_chunk,
        *,
        shares: bool = False,
    ) -> None:
        self.name = name
        self.clear_chunk = clear_chunk
        self._options = options
        self._shares = shares

    def command(self, launch: Launch, files: Files) -> list[str]:
        """A destination needs no image."""
        return [
            *(sys.executable, "-m", "dirtylog.cli.main", "run", *_what(launch), "--memory", str(launch.memory)),
            *("--qmp", str(files.qmp), "--serial", str(files.serial), *self._options),
        ]

    def address(self, destination: Guest, uri: str) -> str:
        """It says on standard error where it waits."""
        if not uri.startswith("tcp:"):
            return uri

        def announced() -> str | None:
            found = re.search(r"waiting for a guest at (tcp:\S+)", destination.complaints())
            return None if found is None else found[1]

        return destination.until(announced, STARTUP_SECONDS, "say where it waits")

    def prepare(self, source: Guest, destination: Guest, terms: Terms) -> None:
        """The destination goes by what the source tells it; events come anyway."""
        del destination
        if terms.channels > 1:
            switch_on(source, "multifd")
            source.qmp.execute("migrate-set-parameters", multifd_channels=terms.channels)
        if self._shares:
            source.qmp.execute("migrate-set-parameters", mode="cpr-transfer")
        if self.clear_chunk:
            source.qmp.execute("migrate-set-parameters", x_clear_chunk=self.clear_chunk)
        source.qmp.execute(
            "migrate-set-parameters", max_bandwidth=terms.bandwidth, downtime_limit=round(terms.limit * 1000)
        )

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
