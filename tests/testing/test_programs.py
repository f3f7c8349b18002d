import shutil
import subprocess
from pathlib import Path

import pytest
from support.require import require

from dirtylog.testing.board import FIRST, LAST_COUNT, LEAST, PAGES, SPAN, STILL
from dirtylog.testing.programs import STAMP, WRITE_LIST, assembled


@pytest.mark.parametrize("listing", [STAMP, WRITE_LIST], ids=["STAMP", "WRITE_LIST"])
def test_bytes_are_what_the_text_assembles_to(listing: str, tmp_path: Path) -> None:
    require("binutils", shutil.which("as") and shutil.which("objcopy"), "this takes as and objcopy")
    source = "".join(f"{line.strip().partition(' ')[2]}\n" for line in listing.splitlines())

    built = subprocess.run(
        ["as", "--32", "-o", "program.o"], input=source.encode(), cwd=tmp_path, capture_output=True, check=False
    )
    require("binutils", built.returncode == 0, f"this assembler is not for x86: {built.stderr.decode()}")
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "program.o", "program"], cwd=tmp_path, check=True)

    assert (tmp_path / "program").read_bytes() == assembled(listing)


def test_program_knows_the_board() -> None:
    assert (4 * LEAST, 4 * STILL, 4 * FIRST, 4 * SPAN, 4 * PAGES, LAST_COUNT) == (0, 4, 8, 12, 16, 0x3FFFF)
    for instruction in (
        "cmpl $0, 4(%ebx)",
        "addl 8(%ebx)",
        "mull 12(%ebx)",
        "cmpl (%ebx)",
        "subl 16(%ebx)",
        "testl $0x3ffff",
    ):
        assert instruction in STAMP
