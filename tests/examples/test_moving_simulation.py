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
        [sys.executable, str(EXAMPLE), "--size", "16M", "--steps", "400", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "an undisturbed simulation ends with the same cells" in done.stdout
