"""Migrate a running guest between two processes, and show that nothing was lost.

Starts two ``dirtylog run`` processes, one with a guest that writes memory for ever and one that waits for it, moves the
guest over while it runs, and shows two proofs: all memory equal on both sides at the moment of the switchover, and the
guest's own counters, which go on growing where it is now.

Leaves nothing behind. Exit status 0 if all of that was seen.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from dirtylog.control.qmp import QMPClient
from dirtylog.errors import DirtylogError, DisconnectedError
from dirtylog.guests.dirtier import COUNTER_ADDRESS, build, check_pages
from dirtylog.units import MIB, PAGE_SIZE, parse_size

DIRTYLOG = (sys.executable, "-m", "dirtylog.cli.main")
WAIT_SECONDS = 15.0


def main() -> int:
    """Run the demonstration."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, and so ends what was started
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--memory", default="1G", help="RAM of the guest (default: 1G)")
    parser.add_argument("--last", default="256M", help="the guest writes pages from 1M up to here (default: 256M)")
    parser.add_argument("--accel", default="auto", help="what runs it: kvm, unicorn or auto (default: auto)")
    options = parser.parse_args()
    try:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dirtylog-")))
            return demonstrate(stack, folder, options.memory, parse_size(options.last), options.accel)
    except DirtylogError as error:
        raise SystemExit(f"live_migration.py: error: {error}") from error


def demonstrate(stack: ExitStack, folder: Path, memory: str, last: int, accel: str) -> int:
    """Start both sides, migrate, compare; the exit status."""
    image, uri = folder / "dirtier.img", f"unix:{folder / 'migration.sock'}"
    image.write_bytes(build(MIB, last))

    step(f"a guest of {memory} starts, and writes a byte in every page from 1 MiB to {last // MIB} MiB, for ever")
    options = ("--memory", memory, "--accel", accel)
    source = stack.enter_context(machine(folder, "source", str(image), *options))
    rounds = wait_for_rounds(source, folder, 2)
    step(f"it has been through its memory {rounds} times; another process waits for it")
    destination = stack.enter_context(machine(folder, "destination", *options, "--incoming", uri))

    step("it is migrated while it runs\n")
    migrate = subprocess.run([*DIRTYLOG, "migrate", str(folder / "source.qmp"), uri, "--verify"], check=False)
    if migrate.returncode:
        return migrate.returncode

    left = read_counter(source, folder)
    arrived = read_counter(destination, folder)
    going_on = wait_for_rounds(destination, folder, arrived + 3)
    destination.execute("stop")
    violation = check_pages(first_bytes(destination, folder, last), read_counter(destination, folder))
    step(f"\nthe source is {source.execute('query-status')['status']} and stays at round {left}")
    step(f"the destination went from round {arrived} to round {going_on}")
    if violation is not None:
        step(f"but its memory is wrong: {violation}")
        return 1
    step("every page on the destination is as the guest's own rule wants it: no write was lost")
    return 0


def step(text: str) -> None:
    """Say what happens; flushed, so that it stands in order with what subprocesses say."""
    print(text, flush=True)


@contextmanager
def machine(folder: Path, name: str, *arguments: str) -> Iterator[QMPClient]:
    """A ``dirtylog run`` process and its QMP session; both end with the block."""
    qmp = folder / f"{name}.qmp"
    command = [*DIRTYLOG, "run", *arguments, "--qmp", str(qmp), "--serial", str(folder / f"{name}.serial")]
    with (folder / f"{name}.log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            with connect(process, qmp, folder / f"{name}.log") as client:
                yield client
                client.execute("quit")
        finally:
            if process.poll() is None:
                process.terminate()


def connect(process: subprocess.Popen[bytes], qmp: Path, log: Path) -> QMPClient:
    """A QMP session with a process that is just starting."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return QMPClient(qmp)
        except DisconnectedError:
            if process.poll() is not None:
                raise SystemExit(log.read_text().strip()) from None
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def read_memory(client: QMPClient, folder: Path, address: int, size: int) -> bytes:
    """Guest physical memory."""
    path = folder / "memory"
    client.execute("pmemsave", val=address, size=size, filename=str(path))
    content = path.read_bytes()
    path.unlink()
    return content


def read_counter(client: QMPClient, folder: Path) -> int:
    """How many rounds the guest has made."""
    return int.from_bytes(read_memory(client, folder, COUNTER_ADDRESS, 8), "little")


def first_bytes(client: QMPClient, folder: Path, last: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """The byte of each page that the guest writes."""
    return np.frombuffer(read_memory(client, folder, MIB, last - MIB), np.uint8)[::PAGE_SIZE]


def wait_for_rounds(client: QMPClient, folder: Path, rounds: int) -> int:
    """Wait until the guest has made that many rounds; how many it has made."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (count := read_counter(client, folder)) < rounds:
        if time.monotonic() > deadline:
            raise SystemExit(f"the guest made only {count} rounds in {WAIT_SECONDS:.0f} s")
        time.sleep(0.01)
    return count


if __name__ == "__main__":
    sys.exit(main())
