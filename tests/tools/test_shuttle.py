import pytest

from dirtylog.linux.kvm import KVM
from tools.shuttle import main


@pytest.mark.parametrize("accel", ["kvm", "unicorn"])
def test_guest_is_whole_after_moves_of_all_kinds_and_nothing_is_left(  # D1, M1, M2, M8
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], accel: str
) -> None:
    if accel == "kvm":
        assert isinstance(request.getfixturevalue("kvm"), KVM)
    assert main(["--moves", "30", "--accel", accel, "--seed", "1"]) == 0, capsys.readouterr().err
    assert "30 moves, " in capsys.readouterr().out
