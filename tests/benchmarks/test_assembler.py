from pathlib import Path

import pytest
from support.benchmark_runs import require_assembler

from benchmarks.support import compiler
from benchmarks.support.assembler import assemble_sector
from dirtylog.errors import HostError
from dirtylog.guests import dirtier

GUESTS = Path(__file__).parents[2] / "guests"


def test_shipped_image_is_what_its_source_is_assembled_to() -> None:
    require_assembler()
    assert assemble_sector(GUESTS / "dirtier.S") == dirtier.build(*dirtier.DEFAULT_RANGE)


@pytest.mark.parametrize(
    ("text", "message"),
    [("no such instruction", "Error: no such instruction"), (".fill 513\n", "made 513 bytes of source.S")],
    ids=["wrong", "too long"],
)
def test_source_that_is_no_sector_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    require_assembler()
    source = tmp_path / "source.S"
    source.write_text(f"_start: .globl _start\n{text}\n")
    with pytest.raises(HostError, match=message):
        assemble_sector(source)


def test_lack_of_a_compiler_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_COMPILERS", ())
    with pytest.raises(HostError, match=r"no compiler to assemble dirtier\.S with; install gcc"):
        assemble_sector(GUESTS / "dirtier.S")
