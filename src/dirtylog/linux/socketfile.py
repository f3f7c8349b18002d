"""Unix sockets as files: who may use the path, what is in its way, and whose it is to remove."""

import os
import socket
import stat
from pathlib import Path
from typing import Final

from dirtylog.errors import HostError, UsageError

MAX_PATH: Final = 107
"""The bytes of a path that fit into ``struct sockaddr_un`` before its final zero (unix(7))."""

_BACKLOG: Final = 128
_OWNER_ONLY: Final = 0o600


def check_path(path: str) -> None:
    """Refuse a path that cannot name a Unix socket.

    Raises:
        UsageError: it is empty, too long, or holds a zero byte.
    """
    size = len(os.fsencode(path))
    if size > MAX_PATH:
        cause = f"the socket path {path} is {size} bytes long, more than the {MAX_PATH} that fit into an address"
        raise UsageError(cause, remedy="choose a shorter path, or a relative one")
    if not path or "\0" in path:
        raise UsageError(f"{path!r} cannot be the path of a socket", remedy="name a file in an existing directory")


class SocketFile:
    """A listening, non-blocking Unix socket and its file, both owned here.

    Only the owner may connect: the mode is 0600 from the moment the file exists. A socket that nobody listens on any
    longer is replaced, any other file is not.

    Attributes:
        path: the file.
        socket: the listening socket.

    Raises:
        UsageError: the path is in use, or cannot name a socket.
        HostError: the host does not let a socket be there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Final = Path(path).absolute()
        name = os.fspath(path)
        check_path(name)
        self.socket: Final = _new_socket(name)
        try:
            self._bind(name)
            self._identity = _identity(self.path)
        except BaseException:
            self.socket.close()
            raise

    def _bind(self, name: str) -> None:
        try:
            _make_way(name)
            os.fchmod(self.socket.fileno(), _OWNER_ONLY)  # bind creates the file with the mode of the socket
            self.socket.bind(name)
            self.socket.listen(_BACKLOG)
            self.socket.setblocking(False)
        except (FileNotFoundError, NotADirectoryError) as error:
            cause = f"the directory of the socket {name} does not exist"
            raise HostError(cause, remedy=f"create it: mkdir -p {self.path.parent}") from error
        except PermissionError as error:
            cause = f"no permission to create the socket {name}"
            raise HostError(cause, remedy="choose a directory that you may write to") from error
        except OSError as error:
            raise HostError(f"cannot listen on the socket {name}: {error.strerror}") from error

    def close(self) -> None:
        """Remove the file, unless another has taken its place, and close the socket; idempotent."""
        if self.socket.fileno() < 0:
            return
        # While the socket is open, its inode is held and no other file can have the same number.
        try:
            if _identity(self.path) == self._identity:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise HostError(f"cannot remove the socket {self.path}: {error.strerror}") from error
        finally:
            self.socket.close()


def _new_socket(name: str) -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise HostError(
            f"cannot make the socket {name}: {error.strerror}", remedy="raise the limit shown by 'ulimit -n'"
        ) from error


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _make_way(name: str) -> None:
    """Remove a socket that nobody listens on; refuse everything else that is there."""
    if not os.path.lexists(name):
        return
    if not stat.S_ISSOCK(os.lstat(name).st_mode):
        cause = f"{name} exists and is not a socket"
        raise UsageError(cause, remedy="choose another path, or remove the file if it is not needed")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            os.unlink(name)
            return
        except FileNotFoundError:
            return
        except (BlockingIOError, PermissionError):  # someone listens with a full queue, or may do so
            pass
    raise UsageError(f"the socket {name} is already in use", remedy="choose another path, or stop who listens there")
