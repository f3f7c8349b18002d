import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dirtylog.cli import doctor
from dirtylog.cli.main import main
from dirtylog.linux.kvm import KVM
from dirtylog.linux.probe import probe_host

Row = dict[str, Any]

NO_KVM = "/nonexistent/kvm"


@pytest.fixture
def no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe_host", partial(probe_host, kvm_device=NO_KVM))


def report(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> Row:
    assert main(["doctor", "--json", *args]) == status
    content: Row = json.loads(capsys.readouterr().out)
    return content


def row(content: Row, name: str) -> Row:
    found: Row
    (found,) = [finding for finding in content["findings"] if finding["name"] == name]
    return found


def test_report_has_the_documented_shape(capsys: pytest.CaptureFixture[str]) -> None:
    content = report(capsys)
    assert content.keys() == {"kernel", "machine", "findings", "missing_essentials"}
    names = [finding["name"] for finding in content["findings"]]
    assert len(names) == len(set(names))
    for finding in content["findings"]:
        kinds = {key: type(value) for key, value in finding.items()}
        assert kinds.pop("value") in (int, type(None))
        assert kinds.pop("remedy") in (str, type(None))
        assert kinds == {
            "name": str, "group": str, "purpose": str, "essential": bool, "available": bool, "detail": str
        }  # fmt: skip


def test_what_is_there_needs_no_remedy_and_what_is_missing_has_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    for finding in report(capsys)["findings"]:
        assert finding["remedy"] is None if finding["available"] else finding["detail"]


def test_report_on_a_host_with_kvm(kvm: KVM, capsys: pytest.CaptureFixture[str]) -> None:
    content = report(capsys)
    assert row(content, "kvm")["value"] == 12
    for name in ("kvm", "kvm-vm", "dirty-log", "memory-slots"):
        assert row(content, name)["available"]


def test_report_without_kvm_says_why_and_how_to_get_it(no_kvm: None, capsys: pytest.CaptureFixture[str]) -> None:
    content = report(capsys)
    kvm = row(content, "kvm")
    assert not kvm["available"]
    assert kvm["detail"] == f"there is no {NO_KVM}"
    assert kvm["remedy"]
    assert not row(content, "manual-protect")["available"]
    assert {"kvm", "dirty-log"} <= set(content["missing_essentials"])
    assert row(content, "memfd")["available"]


def test_names_do_not_depend_on_the_host(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    here = [finding["name"] for finding in report(capsys)["findings"]]
    nothing = partial(probe_host, kvm_device=NO_KVM, userfaultfd_device=NO_KVM, huge_pages=Path(NO_KVM))
    monkeypatch.setattr(doctor, "probe_host", nothing)
    assert [finding["name"] for finding in report(capsys)["findings"]] == here


def test_device_that_is_not_kvm_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "probe_host", partial(probe_host, kvm_device="/dev/null"))
    assert "/dev/null" in row(report(capsys), "kvm")["detail"]


def test_required_and_missing_exits_with_3_and_the_remedy(no_kvm: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--require", "memfd", "--require", "kvm"]) == 3
    shown = capsys.readouterr()
    assert "dirtylog: error: this host lacks kvm\n  remedy: load the module" in shown.err
    assert json.loads(shown.out)


def test_several_missing_are_all_named(no_kvm: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--require", "kvm", "--require", "dirty-log"]) == 3
    assert "this host lacks kvm, dirty-log\n" in capsys.readouterr().err


def test_required_and_there_exits_with_0(no_kvm: None, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, "--require", "memfd", "--require", "page-size")


def test_unknown_requirement_is_refused_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--require", "teleport"]) == 2
    assert "there is no 'teleport' in the report, only x86-64, kvm" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_table_fits_the_width(
    columns: int, no_kvm: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= min(columns, 100)
    assert all(line.isascii() and line.isprintable() for line in lines)


def test_table_shows_findings_remedies_and_verdict(no_kvm: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"no kvm runs guests (there is no {NO_KVM}) remedy: load the module" in shown
    assert "yes memfd guest memory" in shown
    assert "KVM guests cannot be run here without: kvm, kvm-vm" in shown
