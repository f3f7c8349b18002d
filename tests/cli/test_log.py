import logging

import pytest

from dirtylog.cli.log import shown_log


def _log() -> logging.Logger:
    return logging.getLogger("dirtylog.migration")


def test_warnings_are_shown_while_it_lasts(capfd: pytest.CaptureFixture[str]) -> None:
    with shown_log():
        _log().warning("refused %s", "you\x1b[2J")
        _log().info("not that")
    _log().warning("nor that")
    assert capfd.readouterr().err == "dirtylog: refused you\\x1b[2J\n"


def test_defect_is_shown_with_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with shown_log():
        _log().error("oh", exc_info=ZeroDivisionError("why"))
    first, *_, last = capfd.readouterr().err.splitlines()
    assert (first, last) == ("dirtylog: oh", "dirtylog: ZeroDivisionError: why")


def test_standard_error_that_nobody_reads_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("click.echo", fail)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    with shown_log():
        _log().warning("x")
