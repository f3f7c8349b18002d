"""A machine that is taken over from a file."""

import threading

from dirtylog.errors import CancelledError, ProtocolError
from dirtylog.machine import Machine, RunState
from dirtylog.migration.agreement import check_fits
from dirtylog.migration.digest import block_digest
from dirtylog.migration.file import MachineFile


class IncomingFile:
    """Reads a machine into one that never ran, of the same kind and size, and runs it. The file stays as it is.

    Args:
        machine: held in state ``inmigrate`` until it has everything.
        path: what a migration to ``file:PATH`` has written.

    Raises:
        UsageError: there is no such file, or it is of a machine of another kind or size.
        ProtocolError: it is damaged, or something else.
    """

    def __init__(self, machine: Machine, path: str) -> None:
        self._machine = machine
        self._aborted = threading.Event()
        self._file = MachineFile(path)
        try:
            check_fits(machine, self._file.description.machine, self._file.description.blocks)
            machine.hold(RunState.INMIGRATE)
        except BaseException:
            self._file.close()
            raise

    def abort(self) -> None:
        """Make `run` give up, unless it is done."""
        self._aborted.set()

    def run(self) -> None:
        """Read all of it. When this returns the guest is here, and runs if it did when it was saved.

        Raises:
            DirtylogError: it failed. The guest was not started, and the machine cannot be used any more.
        """
        blocks = tuple(self._machine.memory.blocks.values())
        try:
            for _ in self._file.fill(blocks):
                if self._aborted.is_set():
                    raise CancelledError("reading the machine from its file was cancelled")
        finally:
            self._file.close()
        digests = self._file.description.digests
        if digests and digests != tuple(block_digest(block) for block in blocks):
            raise ProtocolError("memory in the file is not what was saved", remedy="migrate it to a file anew")
        self._machine.load_state(self._file.state.parts)
        self._machine.release(RunState.RUNNING if self._file.state.running else RunState.PAUSED)
