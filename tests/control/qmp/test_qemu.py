"""QEMU as the other side: our client talks to it, and our server must answer as it does."""

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.require import require

from dirtylog.control.qmp import QMPClient, QMPCommandError

QEMU = shutil.which("qemu-system-x86_64")


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Path]:
    """The QMP socket of a QEMU without a machine; it is handed the listening socket, so nobody need wait for it."""
    require("qemu", QEMU, "qemu-system-x86_64 is not installed")
    assert QEMU is not None
    path = tmp_path / "qemu.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        chardev = f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off"
        arguments = ["-machine", "none", "-nodefaults", "-display", "none", "-chardev", chardev]
        command = [QEMU, *arguments, "-mon", "chardev=qmp,mode=control"]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()])
    yield path
    process.kill()
    process.wait()


def test_client_drives_qemu(qemu: Path) -> None:
    with QMPClient(qemu) as client:
        assert client.version.qemu.major >= 2
        assert client.execute("query-status")["running"] is True
        client.execute("stop")
        client.execute("cont")
        assert [event.event for event in client.events()] == ["STOP", "RESUME"]
        client.execute("migrate-set-parameters", downtime_limit=500)
        assert client.execute("query-migrate-parameters")["downtime-limit"] == 500
        with pytest.raises(QMPCommandError, match="uri") as caught:
            client.execute("migrate", uri=1)
        assert caught.value.error_class == "GenericError"
        client.execute("quit")
        assert client.wait_event("SHUTDOWN").data == {"guest": False, "reason": "host-qmp-quit"}


REQUESTS = [
    b'{"execute": "query-version"}',
    b'{"execute": "qmp_capabilities", "id": 1}',
    b'{"execute": "qmp_capabilities", "id": 2}',
    b'{"execute": "query-version", "arguments": {}}',
    b'{"execute": "query-version", "id": {"a": [1, null]}}\r\n',
    b'{"execute": "query-version", "id": null}',
    b'{"execute":\n"query-version"\n}',
    b'{"execute": "query-commands", "id": 3}{"execute": "query-version", "id": 4}',
    b'{"execute": "nope", "id": 5}',
    b'{"execute": "query-version", "arguments": {"x": 1}, "id": 6}',
    b'{"execute": "query-version", "arguments": null, "id": 7}',
    b'{"execute": "query-version", "x": 1, "id": 8}',
    b'{"execute": null, "id": 9}',
    b'{"id": 10}',
    b"{}",
    b"[]",
    b"{bad}\n",
    b"\xff\n",
    b'{"execute": \xff\n',
    b'{"execute": "query-version", "id": 11}',
]


def outline(reply: Any) -> Any:
    """A reply without what each side words for itself."""
    if "error" in reply:
        return {"error": reply["error"]["class"], "id": reply.get("id", "none")}
    return {"return": type(reply["return"]).__name__, "id": reply.get("id", "none")}


def converse(path: Path, connect: Callable[[Path], Any]) -> list[Any]:
    """The outline of the replies to all requests; each is answered before the next is sent."""
    client = connect(path)
    assert "QMP" in client.read()
    replies = []
    for request in REQUESTS:
        client.send(request)
        replies += [outline(client.read()) for _ in range(request.count(b"}{") + 1)]
    client.close()
    return replies


def test_server_answers_as_qemu_does(qemu: Path, served: Any, path: Path, connect: Callable[[Path], Any]) -> None:
    assert converse(path, connect) == converse(qemu, connect)
