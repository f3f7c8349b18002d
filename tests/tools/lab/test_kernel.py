"""Finding, fetching and unpacking, with programs in the place of apt's that do as they are told."""

import lzma
import os
from pathlib import Path

import pytest

from dirtylog.errors import HostError
from tools.lab.kernel import Kernel, fetch, unpacked

RELEASE = "6.1.0-9-cloud-amd64"
DEPENDS = f"""\
linux-image-cloud-amd64
  Depends: linux-image-{RELEASE}
  Suggests: linux-doc
"""
UNPACK = f'mkdir -p "$3/boot"; echo boots > "$3/boot/vmlinuz-{RELEASE}"'
DOWNLOAD = f"touch linux-image-{RELEASE}_6.1_amd64.deb"


class Apt:
    """The programs that are used, of which ``log`` has the calls."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir()
        self.log = folder / "log"
        self.program("sudo", 'shift; exec "$@"')
        self.program("apt-cache", f"cat <<'END'\n{DEPENDS}END")
        self.program("apt-get", f'case "$1" in download) {DOWNLOAD};; esac')
        self.program("dpkg-deb", UNPACK)

    def program(self, name: str, script: str) -> None:
        path = self._folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $1" >> {self.log}\n{script}\n')
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Apt:
    folder = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Apt(folder)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def quiet(_: str) -> None:
    pass


def test_kernel_is_what_the_metapackage_depends_on(apt: Apt, cache: Path) -> None:
    kernel = fetch(cache, quiet)
    assert kernel == Kernel(RELEASE, cache / f"linux-image-{RELEASE}")
    assert kernel.image.read_text() == "boots\n"
    assert apt.calls == ["apt-cache depends", "apt-get download", "dpkg-deb --extract"]


def test_kernel_is_fetched_once(apt: Apt, cache: Path) -> None:
    assert fetch(cache, quiet) == fetch(cache, quiet)
    assert apt.calls.count("apt-get download") == 1


def test_lists_are_renewed_where_they_have_no_kernel(apt: Apt, cache: Path, tmp_path: Path) -> None:
    renewed = tmp_path / "renewed"
    apt.program(
        "apt-cache", f"[ -e {renewed} ] || {{ echo 'E: No packages found' >&2; exit 100; }}\ncat <<'END'\n{DEPENDS}END"
    )
    apt.program("apt-get", f'case "$1" in update) touch {renewed};; download) {DOWNLOAD};; esac')
    assert fetch(cache, quiet).release == RELEASE
    assert [call for call in apt.calls if not call.startswith("sudo")][:2] == ["apt-cache depends", "apt-get update"]


def test_system_without_such_a_package_is_told_so(apt: Apt, cache: Path) -> None:
    apt.program("apt-cache", "echo 'E: No packages found' >&2; exit 100")
    with pytest.raises(HostError, match=r"no kernel is to be had through linux-image-cloud-amd64; .* not Debian"):
        fetch(cache, quiet)


def test_failed_download_leaves_nothing(apt: Apt, cache: Path) -> None:
    apt.program("apt-get", "echo 'E: Failed to fetch' >&2; exit 100")
    with pytest.raises(HostError, match="apt-get failed: E: Failed to fetch"):
        fetch(cache, quiet)
    assert not list(cache.iterdir())


def test_package_without_a_kernel_is_refused_and_not_kept(apt: Apt, cache: Path) -> None:
    apt.program("dpkg-deb", 'mkdir -p "$3/usr"')
    with pytest.raises(HostError, match="there is no kernel"):
        fetch(cache, quiet)
    assert not list(cache.iterdir())


class Modules:
    """A kernel's folder with modules that name what they need."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "lib" / "modules" / RELEASE / "kernel"
        self._folder.mkdir(parents=True)
        (folder / "boot").mkdir()
        (folder / "boot" / f"vmlinuz-{RELEASE}").touch()
        self.kernel = unpacked(folder)

    def add(self, file: str, needs: str) -> bytes:
        content = f"\x7fELF\0license=GPL\0depends={needs}\0name={file}\0".encode()
        compressed = file.endswith(".xz")
        (self._folder / file).write_bytes(lzma.compress(content) if compressed else content)
        return content


def test_module_comes_after_those_it_needs(tmp_path: Path) -> None:
    modules = Modules(tmp_path)
    modules.add("kvm-amd.ko", "kvm,ccp")
    modules.add("kvm.ko", "irq_bypass")
    modules.add("irq-bypass.ko", "")
    modules.add("ccp.ko", "")
    assert list(modules.kernel.modules("kvm-amd")) == ["irq_bypass", "kvm", "ccp", "kvm-amd"]


def test_compressed_module_is_unpacked(tmp_path: Path) -> None:
    modules = Modules(tmp_path)
    content = modules.add("kvm.ko.xz", "")
    assert modules.kernel.modules("kvm") == {"kvm": content}


def test_module_that_is_missing_is_named(tmp_path: Path) -> None:
    modules = Modules(tmp_path)
    modules.add("kvm-amd.ko", "kvm")
    with pytest.raises(HostError, match=f"the kernel {RELEASE} has no module kvm$"):
        modules.kernel.modules("kvm-amd")
