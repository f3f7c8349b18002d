"""Filesystems that have room for little, for whoever may make a mount namespace of its own."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from support.processes import Process
from support.require import require

from dirtylog.units import PAGE_SIZE

_NAMESPACE: Final = ("unshare", "--user", "--map-root-user", "--mount")


@contextmanager
def small_disk(directory: Path, pages: int, *, files: int = 100) -> Iterator[Path]:
    """A directory in memory that holds at most so many pages, and files.

    It is mounted where nobody sees it but a process that waits, and found through that one's ``/proc/PID/root``.
    """
    tried = subprocess.run([*_NAMESPACE, "true"], check=False, capture_output=True, text=True)
    require("namespaces", tried.returncode == 0, f"this process may make no user namespace: {tried.stderr.strip()}")
    options = f"size={pages * PAGE_SIZE},nr_inodes={files + 1}"  # the directory itself is one
    script = f"mount -t tmpfs -o {options} none {directory} && echo mounted && exec sleep 3600"
    with Process((*_NAMESPACE, "sh", "-c", script)) as holder:
        holder.wait_for_line("mounted")
        yield Path(f"/proc/{holder.pid}/root{directory}")
