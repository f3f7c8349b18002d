import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.own_memory import require_write_watch

EXAMPLE = Path(__file__).parents[2] / "examples" / "moving_simulation.py"


@pytest.mark.parametrize("options", [[], ["--local"]], ids=["copied", "shared"])
def test_moved_simulation_loses_no_step(options: list[str]) -> None:
    require_write_watch()
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--size", "16M", "--steps", "800", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    left, arrived = re.findall(r" at step (\d+)", done.stdout)
    assert left == arrived
    assert "an undisturbed simulation ends with the same cells" in done.stdout


def test_simulation_that_is_over_too_soon_says_so(tmp_path: Path) -> None:
    require_write_watch()
    command = [sys.executable, str(EXAMPLE), "--size", "16M", "--steps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "the simulation was over before it was moved; give it more --steps" in done.stderr
    assert "Traceback" not in done.stderr
