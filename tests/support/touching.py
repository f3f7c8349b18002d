"""Threads that touch memory as guests do: without the interpreter's lock, so that others can bring what they need."""

import ctypes
import threading

from support.waiting import Task

from dirtylog.linux.mapping import MemfdMapping


class Touch:
    """A thread that reads memory, and waits in the kernel while that is absent.

    Attributes:
        thread: the kernel's number of it; 0 until it has begun.
    """

    def __init__(self, mapping: MemfdMapping, offset: int, size: int = 1) -> None:
        self.thread = 0
        self._held = mapping.memory  # stays mapped while it waits
        self._address = mapping.address + offset
        self._into = ctypes.create_string_buffer(size)
        self._task = Task(self._read)

    def _read(self) -> None:
        self.thread = threading.get_native_id()
        ctypes.memmove(self._into, self._address, len(self._into))

    @property
    def waits(self) -> bool:
        """Whether it has not got what it reads."""
        return self._task.running

    def result(self) -> bytes:
        """What it read, once it could."""
        self._task.join()
        return self._into.raw
