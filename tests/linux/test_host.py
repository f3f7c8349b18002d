from pathlib import Path

import pytest

from dirtylog.errors import HostError
from dirtylog.linux import host as host_module
from dirtylog.linux.host import available_memory
from dirtylog.units import GIB, KIB, MIB

_MEMINFO = "MemTotal:       24000000 kB\nMemFree:         1000 kB\nMemAvailable:    8388608 kB\nBuffers: 5 kB\n"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with 8 GiB free, and no control groups yet."""
    for name in ("_MEMINFO", "_GROUPS"):
        monkeypatch.setattr(host_module, name, tmp_path / name)
    monkeypatch.setattr(host_module, "_GROUP_ROOT", tmp_path / "groups")
    (tmp_path / "_MEMINFO").write_text(_MEMINFO)
    (tmp_path / "_GROUPS").write_text("")
    return tmp_path


def _group(host: Path, path: str, limit: int | str, usage: int, *, version: int = 2) -> None:
    folder = host / "groups" / path
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")


def test_this_host_has_some() -> None:
    assert 1 * MIB < available_memory() < 1 << 60


def test_it_is_what_the_kernel_calls_available(host: Path) -> None:
    assert available_memory() == 8 * GIB


def test_kernel_that_does_not_tell_is_reported(host: Path) -> None:
    (host / "_MEMINFO").write_text("MemTotal: 5 kB\n")
    with pytest.raises(HostError, match="does not tell how much memory is free"):
        available_memory()


@pytest.mark.parametrize("path", ["/a/b", "/a", "/a/b/c"])
def test_control_groups_limit_counts_for_those_in_it(host: Path, path: str) -> None:
    (host / "_GROUPS").write_text(f"0::{path}\n")
    _group(host, "a", "max", 7 * GIB)
    _group(host, "a/b", 3 * GIB, 1 * GIB)
    _group(host, "a/b/c", 1 * GIB, 512 * MIB)
    assert available_memory() == {"/a": 8 * GIB, "/a/b": 2 * GIB, "/a/b/c": 512 * MIB}[path]


def test_limit_of_a_container_that_sees_only_itself_counts(host: Path) -> None:
    (host / "_GROUPS").write_text("0::/../../somewhere/else\n")
    _group(host, "", 1 * GIB, 512 * MIB)
    assert available_memory() == 512 * MIB


def test_group_over_its_limit_has_nothing_left(host: Path) -> None:
    (host / "_GROUPS").write_text("0::/a\n")
    _group(host, "a", 1 * GIB, 1 * GIB + KIB)
    assert available_memory() == 0


@pytest.mark.parametrize("controllers", ["memory", "cpuset,memory"])
def test_groups_of_the_first_version_count_too(host: Path, controllers: str) -> None:
    (host / "_GROUPS").write_text(f"5:cpu:/x\n4:{controllers}:/a/b\n1:name=systemd:/\n0::/\n")
    _group(host, "memory/a/b", 9223372036854771712, 5 * GIB, version=1)
    _group(host, "memory/a", 1 * GIB, 256 * MIB, version=1)
    assert available_memory() == 768 * MIB
