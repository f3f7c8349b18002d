"""``python tools/shuttle.py``: sends a running guest from machine to machine, in a way chosen at random each time.

After each move the guest must run in one place and keep its page rule; at the end this process must have no more
descriptors and threads than after the first moves, and not much more memory.
"""

import ctypes
import gc
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from dirtylog.cli.main import exit_status
from dirtylog.errors import CancelledError, DirtylogError, DisconnectedError, GuestError
from dirtylog.guests import dirtier
from dirtylog.linux.kvm import KVM
from dirtylog.machine import KVMMachine, PCMachine, RunState, UnicornMachine, boot_sector
from dirtylog.machine.pc import RAM_NAME
from dirtylog.migration import (
    Compression,
    IncomingMigration,
    Listener,
    OutgoingMigration,
    Parameters,
    Status,
    parse_address,
)
from dirtylog.units import KIB, MIB, PAGE_SIZE

_MEMORY: Final = 16 * MIB
_FIRST: Final = 1 * MIB
_LAST: Final = 9 * MIB
_SECONDS: Final = 30.0
_WARM: Final = 20
"""Moves after which no further descriptor and thread may be left over."""
_SETTLED: Final = 100
"""Moves after which malloc has its arenas, and memory is at rest but for what it happens to hold."""
_MORE_OBJECTS: Final = 200
_MORE_MEMORY: Final = 64 * MIB


@dataclass(frozen=True, slots=True)
class Move:
    """One way to move a guest.

    Attributes:
        parameters: of the migration.
        scheme: of its address.
        early: whether the guest is handed over at once.
        cancel: seconds until it is cancelled; never if None.
        pause: whether its connections are cut after the handover, and made anew.
    """

    parameters: Parameters
    scheme: str
    early: bool = False
    cancel: float | None = None
    pause: bool = False

    def __str__(self) -> str:
        facts = [self.scheme, f"limit {self.parameters.downtime_limit:g} s", f"{self.parameters.channels} channels"]
        names = ("verify", "share_memory", "postcopy", "delta_cache")
        facts += [name for name in names if getattr(self.parameters, name)]
        facts += [name for name in ("early", "cancel", "pause") if getattr(self, name)]
        return ", ".join(facts)


def choose(choice: random.Random) -> Move:
    """Any way that there is."""
    parameters = Parameters(
        downtime_limit=choice.choice((0.02, 0.3, 2.0)),
        max_bandwidth=choice.choice((0, 0, 40 * MIB)),
        clear_chunk=choice.choice((PAGE_SIZE, MIB, 128 * MIB)),
        channels=choice.choice((1, 1, 2, 3)),
        compression=choice.choice(tuple(Compression)),
        delta_cache=choice.choice((0, MIB)),
    )
    scheme = choice.choice(("unix", "tcp"))
    way = choice.choice(("plain", "verify", "share", "postcopy", "postcopy", "cancel"))
    if way == "share":
        return Move(replace(parameters, share_memory=True, channels=1), "unix")
    if way == "postcopy":
        return Move(replace(parameters, postcopy=True), scheme, early=True, pause=choice.random() < 0.5)
    if way == "cancel":
        return Move(replace(parameters, downtime_limit=0.0), scheme, cancel=choice.random() * 0.2)
    return Move(replace(parameters, verify=way == "verify", downtime_limit=2.0), scheme)


class Guest:
    """A machine, and how often its guest has told that it completed a round."""

    def __init__(self, make: Callable[..., PCMachine]) -> None:
        self._told = threading.Semaphore(0)
        self.machine = make(_MEMORY, transmit=self._take)

    def _take(self, data: bytes) -> None:
        self._told.release(len(data))

    def wait(self) -> None:
        """Return once the guest has completed another round.

        Raises:
            GuestError: it does not.
        """
        while self._told.acquire(blocking=False):
            pass
        for _ in range(2):
            if not self._told.acquire(timeout=_SECONDS):
                raise GuestError(f"the guest completed no round within {_SECONDS:.0f} s")

    def check(self) -> None:
        """See that it runs, and has lost nothing.

        Raises:
            GuestError: it does not, or has.
        """
        self.wait()
        self.machine.pause()
        rounds = int.from_bytes(self.machine.system.read(dirtier.COUNTER_ADDRESS, 8), "little")
        pages = self.machine.memory.blocks[RAM_NAME].array[_FIRST:_LAST:PAGE_SIZE]
        wrong = dirtier.check_pages(pages, rounds)
        if wrong is not None:
            raise GuestError(f"the guest was damaged: {wrong}")
        self.machine.resume()


def move(source: Guest, make: Callable[..., PCMachine], way: Move, folder: Path) -> Guest:
    """Move a guest; where it runs then. The other machine is closed.

    Raises:
        DirtylogError: it went wrong.
    """
    destination = Guest(make)
    uri = f"unix:{folder}/m" if way.scheme == "unix" else "tcp:127.0.0.1:0"
    with closing(Listener(parse_address(uri))) as listener:
        incoming = IncomingMigration(destination.machine, listener)
        outgoing = OutgoingMigration(source.machine, listener.address, way.parameters)
        if way.early:
            outgoing.start_postcopy()
        with _running(incoming.run) as arrived:
            try:
                with _interfering(way, outgoing, incoming, folder):
                    outgoing.run()
            except (CancelledError, DisconnectedError):
                if way.cancel is None and incoming.status is not Status.COMPLETED:
                    raise
                incoming.abort()
        moved = incoming.status is Status.COMPLETED
        if moved:
            arrived.check()
    here, there = (destination, source) if moved else (source, destination)
    if there.machine.state is RunState.RUNNING or here.machine.state is not RunState.RUNNING:
        raise GuestError(f"the guest is {there.machine.state.value} where it was, and {here.machine.state.value} here")
    there.machine.close()
    return here


class _Arrived:
    """What became of the other side."""

    error: Exception | None = None

    def check(self) -> None:
        if self.error is not None:
            raise self.error


@contextmanager
def _running(run: Callable[[], None]) -> Iterator[_Arrived]:
    arrived = _Arrived()

    def main() -> None:
        try:
            run()
        except Exception as error:  # noqa: BLE001 - raised by `check`
            arrived.error = error

    thread = threading.Thread(target=main, name="destination")
    thread.start()
    try:
        yield arrived
    finally:
        thread.join()


@contextmanager
def _interfering(way: Move, outgoing: OutgoingMigration, incoming: IncomingMigration, folder: Path) -> Iterator[None]:
    """Cancel a migration, or cut its connections and make new ones, while it runs."""
    over = threading.Event()

    def main() -> None:
        if way.cancel is not None and not over.wait(way.cancel):
            outgoing.cancel()
        while way.pause and not over.wait(0.001):
            if outgoing.status is Status.POSTCOPY_ACTIVE:
                outgoing.pause()
                break
        while way.pause and not over.wait(0.001):
            if outgoing.status is Status.POSTCOPY_PAUSED and incoming.status is Status.COMPLETED:
                outgoing.cancel()  # the last answer was lost, and nobody is there to say it again
                return
            if outgoing.status is incoming.status is Status.POSTCOPY_PAUSED:
                _recover(outgoing, incoming, f"unix:{folder}/again")
                return

    thread = threading.Thread(target=main, name="interference")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _recover(outgoing: OutgoingMigration, incoming: IncomingMigration, uri: str) -> None:
    listener = Listener(parse_address(uri))
    incoming.recover(lambda: listener)
    outgoing.resume(listener.address)


def _held() -> tuple[int, int]:
    """Python's objects, and bytes of memory that is not shared: the guests' own comes and goes (RssAnon, proc(5))."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what threads that ended gave back, malloc keeps for others
    status = Path("/proc/self/status").read_text().split()
    return len(gc.get_objects()), int(status[status.index("RssAnon:") + 1]) * KIB


def _used() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--moves", type=click.IntRange(min=_WARM + 1), default=200, show_default=True, help="How many.")
@click.option("--accel", type=click.Choice(["kvm", "unicorn"]), default="kvm", show_default=True)
@click.option("--seed", type=int, help="What a failure named; else another in each run.")
def command(moves: int, accel: str, seed: int | None) -> None:
    """Send a running guest from machine to machine, in a way chosen at random each time."""
    make: Callable[..., PCMachine] = KVMMachine if accel == "kvm" else UnicornMachine
    if accel == "kvm":
        with KVM():
            pass
    chosen = seed if seed is not None else random.SystemRandom().randrange(1 << 32)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    choice, guest = random.Random(chosen), Guest(make)  # noqa: S311 - no secret is made of it
    boot_sector(guest.machine, dirtier.build(_FIRST, _LAST))
    guest.machine.resume()
    guest.check()
    moved, before, held = 0, (0, 0), (0, 0)
    with tempfile.TemporaryDirectory(prefix="dirtylog-") as folder:
        for number in range(1, moves + 1):
            way = choose(choice)
            try:
                there = move(guest, make, way, Path(folder))
                moved, guest = moved + (there is not guest), there
                guest.check()
            except DirtylogError as error:
                raise GuestError(f"move {number} ({way}; --seed {chosen}): {error}") from error
            if number == _WARM:
                before = _used()
            if number == min(moves, _SETTLED):
                held = _held()
    after, (objects, grown) = _used(), (late - early for early, late in zip(held, _held(), strict=True))
    guest.machine.close()
    if after[0] > before[0] or after[1] > before[1] or objects > _MORE_OBJECTS or grown > _MORE_MEMORY:
        raise GuestError(
            f"descriptors and threads grew from {before} to {after}, memory by {objects} objects and {grown} bytes"
        )
    console.print(
        f"{moves} moves, {moved} of them completed and the others cancelled; descriptors and threads: {before} after"
        f" {_WARM} moves, {after} after all; memory since move {min(moves, _SETTLED)}: {objects:+} objects,"
        f" {grown / MIB:+.1f} MiB"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the given command line, or the process's own; the exit status."""
    try:
        command.main(arguments, prog_name="shuttle.py", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except DirtylogError as error:
        click.echo(f"shuttle: error: {error}", err=True)
        return exit_status(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
