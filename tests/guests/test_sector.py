"""What all guests have in common."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from support.require import require

from dirtylog.errors import HostError, UsageError
from dirtylog.guests import dirtier, random_writer, sector
from dirtylog.units import GIB, KIB, MIB, PAGE_SIZE

REPOSITORY: Final = Path(__file__).parents[2]
SHIPPED: Final = REPOSITORY / "src/dirtylog/guests"
IMAGES: Final = sorted(path.name for path in SHIPPED.glob("*.img"))
BUILDERS: Final[dict[str, Callable[[int, int], bytes]]] = {
    "dirtier.img": dirtier.build,
    "random_writer.img": random_writer.build,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images, built from their sources."""
    missing = [tool for tool in ("make", "as", "ld", "objcopy") if shutil.which(tool) is None]
    require("binutils", not missing, f"rebuilding the guests needs {', '.join(missing)}")
    x86 = subprocess.run(["as", "--32", "-o", "/dev/null", "/dev/null"], capture_output=True, check=False)
    require("binutils", x86.returncode == 0, "this host's assembler is not for x86")
    folder = tmp_path_factory.mktemp("built")
    subprocess.run(
        ["make", "--silent", "-C", str(REPOSITORY / "guests"), f"BUILD={folder}"], check=True, capture_output=True
    )
    return folder


def test_there_is_a_builder_for_each_image() -> None:
    assert list(BUILDERS) == IMAGES


@pytest.mark.parametrize("name", IMAGES)
def test_shipped_image_is_what_its_source_builds(built: Path, name: str) -> None:
    assert (built / name).read_bytes() == (SHIPPED / name).read_bytes()


@pytest.mark.parametrize("name", IMAGES)
def test_default_range_is_the_shipped_one(name: str) -> None:
    assert BUILDERS[name](*sector.DEFAULT_RANGE) == (SHIPPED / name).read_bytes()


@pytest.mark.parametrize("name", IMAGES)
def test_image_is_a_boot_sector_without_partitions(name: str) -> None:
    image = BUILDERS[name](*sector.DEFAULT_RANGE)
    assert len(image) == 512
    assert image[446:510] == bytes(64)
    assert image[510:] == b"\x55\xaa"


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (1 * MIB + 1, 2 * MIB, "not whole pages"),
        (1 * MIB, 1 * MIB, "holds no page"),
        (64 * KIB - PAGE_SIZE, 1 * MIB, "own code or counter"),
        (1 * MIB, 3 * GIB + PAGE_SIZE, "PCI hole"),
    ],
)
def test_range_that_cannot_be_is_refused(name: str, first: int, last: int, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        BUILDERS[name](first, last)
    assert caught.value.remedy is not None


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("damage", ["missing", "short", "other"])
def test_damaged_installation_is_named(name: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (SHIPPED / name).read_bytes()
    if damage != "missing":
        (tmp_path / name).write_bytes(content[:-1] if damage == "short" else b"\xeb\x00\x00\x00XXX1" + content[8:])
    monkeypatch.setattr("dirtylog.guests.sector.resources.files", lambda package: tmp_path)
    with pytest.raises(HostError, match=f"{name} (cannot be read|is damaged)"):
        BUILDERS[name](*sector.DEFAULT_RANGE)
