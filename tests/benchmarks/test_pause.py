import msgspec
import pytest
from click.testing import CliRunner

from benchmarks.pause import command
from dirtylog.linux.kvm import KVM


@pytest.mark.usefixtures("kvm")
def test_both_ways_of_stopping_a_guest_are_measured() -> None:
    result = CliRunner().invoke(command, ["--runs", "3", "--json"], catch_exceptions=False)
    taken = msgspec.json.decode(result.output, type=dict[str, list[float]])
    assert {name: len(seconds) for name, seconds in taken.items()} == {"raw system calls": 3, "Machine.pause": 3}


def test_table_has_a_row_for_each(kvm: KVM) -> None:
    result = CliRunner().invoke(command, ["--runs", "3"], catch_exceptions=False)
    assert "raw system calls" in result.output
    assert "Machine.pause" in result.output
