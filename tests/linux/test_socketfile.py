import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from dirtylog.errors import HostError, UsageError
from dirtylog.linux.socketfile import MAX_PATH, SocketFile, check_path


@pytest.fixture
def no_umask() -> Iterator[None]:
    old = os.umask(0)
    yield
    os.umask(old)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "test.sock"


def leave_stale_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(path))


def test_socket_is_for_its_owner_only(path: Path, no_umask: None) -> None:
    file = SocketFile(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    file.close()


def test_close_removes_the_file_and_may_be_repeated(path: Path) -> None:
    file = SocketFile(path)
    file.close()
    file.close()
    assert not path.exists()


def test_path_may_be_used_again_after_close(path: Path) -> None:
    SocketFile(path).close()
    SocketFile(path).close()


def test_relative_path_is_removed_after_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = SocketFile("here.sock")
    monkeypatch.chdir("/")
    file.close()
    assert not (tmp_path / "here.sock").exists()


def test_stale_socket_is_replaced(path: Path) -> None:
    leave_stale_socket(path)
    file = SocketFile(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
    file.close()


def test_live_socket_is_left_alone(path: Path) -> None:
    file = SocketFile(path)
    with pytest.raises(UsageError, match="already in use; choose another path"):
        SocketFile(path)
    assert path.exists()
    file.close()


def test_live_socket_with_a_full_queue_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))
        with pytest.raises(UsageError, match="already in use"):
            SocketFile(path)
    assert path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_other_kinds_of_files_are_left_alone(path: Path, kind: str) -> None:
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case _:
            path.symlink_to("nowhere")
    with pytest.raises(UsageError, match="exists and is not a socket; choose another path"):
        SocketFile(path)
    assert path.is_symlink() or path.exists()


def test_socket_that_took_the_place_is_left_alone(path: Path) -> None:
    file = SocketFile(path)
    path.unlink()
    leave_stale_socket(path)
    file.close()
    assert path.exists()


def test_file_that_somebody_removed_does_not_hinder_close(path: Path) -> None:
    file = SocketFile(path)
    path.unlink()
    file.close()


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="does not exist; create it: mkdir -p"):
        SocketFile(tmp_path / "missing" / "qmp.sock")


def test_file_as_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=r"directory of the socket .* does not exist"):
        SocketFile(tmp_path / "file" / "qmp.sock")


def test_directory_without_permission_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        path.parent.chmod(0o500)
    else:  # root may write everywhere, so the refusal is played
        monkeypatch.setattr(os, "fchmod", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(HostError, match=r"no permission to create the socket .*; choose a directory"):
        SocketFile(path)
    path.parent.chmod(0o700)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("", "cannot be the path of a socket"),
        ("\0abstract", "cannot be the path of a socket"),
        ("x" * (MAX_PATH + 1), "108 bytes long, more than the 107"),
        ("é" * 60, "120 bytes long, more than the 107"),
    ],
)
def test_path_that_is_no_address_is_refused(name: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        check_path(name)
    with pytest.raises(UsageError, match=cause):
        SocketFile(name)


def test_longest_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = SocketFile("x" * MAX_PATH)
    assert file.path.is_socket()
    file.close()
