"""Measured migrations for tests of what is made of them, and what it takes to measure some."""

import shutil
import subprocess
from typing import Final

from support.require import require

from benchmarks.support.compiler import find_compiler
from benchmarks.support.measure import Outcome, Run, Side
from benchmarks.support.usage import CPUTime, ResidentMemory
from dirtylog.control.commands import PassInfo
from dirtylog.units import MIB

SIDE: Final = Side(CPUTime(0.25, 0.5), ResidentMemory(90 * MIB, 20 * MIB, 10 * MIB, 60 * MIB, 60 * MIB), 30 * MIB)


def require_assembler() -> None:
    """Skips the test where no compiler assembles for x86."""
    found = find_compiler()
    require("cc", found, "there is no C compiler")
    require("binutils", shutil.which("as") and shutil.which("ld"), "this takes as and ld")
    command = [str(found), "-m32", "-x", "assembler", "-c", "-o", "/dev/null", "/dev/null"]
    done = subprocess.run(command, capture_output=True, check=False)
    require("binutils", done.returncode == 0, "this host's assembler is not for x86")


def a_pass(number: int) -> PassInfo:
    return PassInfo(
        number=number,
        pages=256,
        zero_pages=0,
        bytes=MIB,
        seconds=0.01,
        starved=0.0,
        dirtied=0,
        bandwidth=1e8,
        expected_downtime=None,
    )


def a_run(
    peer: str,
    total: float,
    *,
    outcome: Outcome = Outcome.COMPLETED,
    setup: str = "guest writes 1..100 MiB",
    expected: float | None = None,
    passes: tuple[int, ...] = (),
) -> Run:
    arrived = outcome is Outcome.COMPLETED
    return Run(
        peer=peer,
        setup=setup,
        outcome=outcome,
        load=0.5,
        steal=0.25,
        wall=total,
        total=total,
        downtime=0.05 if arrived else None,
        stopped=0.06 if arrived else None,
        expected_downtime=expected,
        bytes=200 * MIB,
        pages=51_200,
        zero_pages=1000,
        passes=3,
        pace=7.0,
        source=SIDE,
        destination=SIDE if arrived else None,
        x_passes=[a_pass(number) for number in passes],
    )
