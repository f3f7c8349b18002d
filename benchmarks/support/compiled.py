"""Listing runs in C."""

import os
import subprocess
from pathlib import Path
from typing import Final, Self

import numpy as np

from benchmarks.support.compiler import compile_program, find_compiler
from benchmarks.support.timing import Samples
from dirtylog.errors import PeerError
from dirtylog.memory import Words

SOURCE: Final = Path(__file__).with_name("list_runs.c")
_SECONDS: Final = 60
_PIECE: Final = 1 << 24


class RunLister:
    """A program that lists the runs of a bitmap."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def compiled(cls, folder: Path) -> Self | None:
        """Compile it into a folder; None where there is no compiler.

        Raises:
            HostError: the compiler does not do its work.
        """
        return None if find_compiler() is None else cls(compile_program(folder, [SOURCE]))

    def measure(self, words: Words, runs: int) -> tuple[int, Samples]:
        """How many runs a bitmap has, and the seconds it takes to list them, after once for warming up."""
        handle = os.memfd_create("bitmap")
        with open(handle, "wb", buffering=0) as file:
            content = words.view(np.uint8).data
            file.writelines(content[start : start + _PIECE] for start in range(0, words.nbytes, _PIECE))
            os.lseek(handle, 0, os.SEEK_SET)
            result = subprocess.run(
                [self._path, str(runs + 1)], stdin=handle, capture_output=True, text=True, timeout=_SECONDS
            )
        if result.returncode:
            raise PeerError(f"{self._path} failed: {result.stderr.strip()}")
        lines = [line.split() for line in result.stdout.splitlines()]
        return int(lines[0][0]), [int(nanoseconds) / 1e9 for _, nanoseconds in lines[1:]]
