"""``dirtylog run`` with the dirtier in it, and what its memory says."""

from pathlib import Path
from typing import Final

import numpy as np
from support.processes import Run
from support.waiting import wait_until

from dirtylog.guests.dirtier import COUNTER_ADDRESS, STARTED, STARTED_ADDRESS, build, check_pages
from dirtylog.units import MIB, PAGE_SIZE

MEMORY: Final = "16M"
RANGE: Final = (1 * MIB, 8 * MIB)
ENDLESS: Final = ("--max-downtime", "1ms", "--bandwidth", "16M", "--compression", "none", "--delta-cache", "0")
"""Options of ``dirtylog migrate`` with which the dirtier is faster than the link. Compressed, it would take no time."""


class Place:
    """A directory with the dirtier's image, for sockets and other files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.image = directory / "dirtier.img"
        self.image.write_bytes(build(*RANGE))

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def source(self, *options: str) -> Run:
        return Run(self.directory / "source.qmp", str(self.image), "--memory", MEMORY, *options)

    def destination(self, uri: str, *options: str, name: str = "destination") -> Run:
        return Run(self.directory / f"{name}.qmp", "--incoming", uri, "--memory", MEMORY, *options)

    def left(self) -> list[str]:
        """The files that are here besides the image."""
        return sorted(file.name for file in self.directory.iterdir() if file != self.image)

    def _read(self, run: Run, address: int, size: int) -> bytes:
        dump = self.directory / "dump"
        try:
            return run.memory(address, size, dump)
        finally:
            dump.unlink(missing_ok=True)

    def rounds(self, run: Run) -> int:
        return int.from_bytes(self._read(run, COUNTER_ADDRESS, 8), "little")

    def wait_for_round(self, run: Run) -> None:
        """Return once the guest has completed another round."""
        before = self.rounds(run)
        wait_until(lambda: self.rounds(run) > before, "the guest completed another round")

    def check_memory(self, run: Run) -> None:
        """The page rule holds in a guest that stands still."""
        assert self._read(run, STARTED_ADDRESS, len(STARTED)) == STARTED
        content = np.frombuffer(self._read(run, RANGE[0], RANGE[1] - RANGE[0]), np.uint8)
        assert check_pages(content[::PAGE_SIZE], self.rounds(run)) is None

    def check_runs_on(self, run: Run) -> None:
        """The guest runs, and has lost nothing."""
        assert run.state == "running"
        self.wait_for_round(run)
        run.qmp.execute("stop")
        self.check_memory(run)
        run.qmp.execute("cont")
