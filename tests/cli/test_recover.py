from pathlib import Path

import pytest

from dirtylog.cli.main import main
from dirtylog.control.migration_commands import RecoverArguments
from dirtylog.control.qmp import CommandRegistry, QMPServer
from dirtylog.errors import UsageError


def _recover(path: Path, uri: str, refusal: UsageError | None = None) -> tuple[int, list[str]]:
    heard: list[str] = []

    def recover(arguments: RecoverArguments) -> None:
        if refusal is not None:
            raise refusal
        heard.append(arguments.uri)

    registry = CommandRegistry()
    registry.add("migrate-recover", RecoverArguments, recover)
    server = QMPServer(path / "qmp", registry)
    with server:
        server.start()
        return main(["recover", str(path / "qmp"), uri]), heard


def test_destination_is_told_where_to_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _recover(tmp_path, "unix:x") == (0, ["unix:x"])
    assert capsys.readouterr().out == "waiting for the source at unix:x\n"


def test_what_is_no_address_is_refused_before_anybody_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _recover(tmp_path, "x") == (2, [])
    assert "is not a migration address" in capsys.readouterr().err


def test_destination_that_lost_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _recover(tmp_path, "unix:x", UsageError("only postcopy that was paused"))[0] == 5
    assert "only postcopy that was paused" in capsys.readouterr().err
