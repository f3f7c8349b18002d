"""docs/security.md: its commands, run."""

import re
import shutil
import subprocess
from pathlib import Path

from support.connections import HOST
from support.require import require
from support.tls import encrypted_channels

from dirtylog.migration.messages import Hello

PAGE = Path(__file__).parents[1] / "docs/security.md"


def test_commands_make_credentials_that_both_sides_accept(tmp_path: Path) -> None:
    require("openssl", shutil.which("openssl"), "openssl is not installed")
    authority, host, _ = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    script = f"set -e\n{authority}{host.replace('192.0.2.1', HOST)}"
    subprocess.run(["sh", "-c", script], cwd=tmp_path, check=True, capture_output=True)
    with encrypted_channels(str(tmp_path / "host1.example.org")) as (source, destination):
        source.send(hello := Hello("fake", (), False, 1, bytes(16), False, False))
        assert destination.expect(Hello) == hello
