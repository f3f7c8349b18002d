"""Boot sectors that only benchmarks need, assembled when they are needed."""

import subprocess
import tempfile
from pathlib import Path
from typing import Final

from benchmarks.support.compiler import find_compiler
from dirtylog.errors import HostError
from dirtylog.guests.sector import LOAD_ADDRESS
from dirtylog.machine.boot import BOOT_SECTOR_SIZE

_INCLUDED: Final = Path(__file__).parents[2] / "guests"
_SECONDS: Final = 60


def assemble_sector(source: Path) -> bytes:
    """The boot sector that a source is, which may include those of the guests.

    Raises:
        HostError: there is no assembler for x86, or it does not do its work.
    """
    compiler = find_compiler()
    if compiler is None:
        raise HostError(f"there is no compiler to assemble {source.name} with", remedy="install gcc and libc6-dev")
    with tempfile.TemporaryDirectory(prefix="dirtylog-bench-") as folder:
        path = Path(folder) / source.stem
        layout = f"-Wl,--build-id=none,-Ttext={LOAD_ADDRESS:#x},--oformat=binary"
        command = [compiler, "-m32", "-x", "assembler", f"-Wa,--fatal-warnings,-I,{_INCLUDED}", "-nostdlib", "-static"]
        command += [layout, "-o", str(path), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if result.returncode:
            raise HostError(f"{' '.join(command)} failed: {result.stderr.strip()}", remedy="is it GNU's, and for x86?")
        sector = path.read_bytes()
    if len(sector) != BOOT_SECTOR_SIZE:
        raise HostError(f"{compiler} made {len(sector)} bytes of {source.name}", remedy="use gcc and GNU binutils")
    return sector
