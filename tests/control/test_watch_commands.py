"""The commands that watch memory, as dirtylog's own client sends them, and as raw JSON."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from support.fake_machine import FIRST, LAST, RAM_PAGES, ROM_PAGES, FakeMachine
from support.guests import machine, wait_for_rounds
from support.waiting import wait_until

from dirtylog.control import watch_commands
from dirtylog.control.commands import Commands
from dirtylog.control.controller import Controller
from dirtylog.control.qmp import CommandRegistry, QMPClient, QMPCommandError, QMPServer
from dirtylog.control.watch import RemoteWatch, SampleInfo
from dirtylog.display import unpack
from dirtylog.errors import DirtylogError
from dirtylog.guests.dirtier import COUNTER_ADDRESS
from dirtylog.memory import TrackingReason
from dirtylog.units import PAGE_SIZE

WRITTEN: Final = {*range(FIRST // PAGE_SIZE, LAST // PAGE_SIZE), COUNTER_ADDRESS // PAGE_SIZE}
"""What the guest writes in a round."""


class Served:
    """A fake machine that answers QMP."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        guest = stack.enter_context(machine("fake", boot=True))
        assert isinstance(guest, FakeMachine)
        self.guest = guest
        self.path = path
        self.failures: list[DirtylogError] = []
        controller = Controller(self.guest)
        stack.callback(controller.close)
        registry = CommandRegistry()
        Commands(controller).register(registry)
        server = QMPServer(path, registry, on_failure=self.failures.append)
        stack.callback(server.close)
        server.start()

    def stored(self, name: str) -> int:
        return self.guest.memory.blocks[name].stored

    def tracking(self) -> TrackingReason:
        return self.guest.memory.tracking


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with ExitStack() as stack:
        served = Served(stack, tmp_path / "qmp")
        yield served
    assert served.failures == []


@pytest.fixture
def qmp(served: Served) -> Iterator[QMPClient]:
    with QMPClient(served.path) as client:
        yield client


def test_watch_tells_the_pages_that_the_guest_writes(served: Served, qmp: QMPClient) -> None:
    with RemoteWatch(qmp) as watch:
        assert watch.blocks == {"ram": RAM_PAGES, "rom": ROM_PAGES}
        assert watch.sample().pages == 0
        assert watch.status == "prelaunch"
        served.guest.resume()
        wait_for_rounds(served.guest, 3)
        sample = watch.sample()
        assert set(sample.written["ram"].indices().tolist()) == WRITTEN
        assert sample.written["rom"].count() == 0
        assert sample.seconds > 0
        assert watch.status == "running"


def test_reply_has_what_the_client_needs_and_no_more(served: Served, qmp: QMPClient) -> None:
    assert qmp.execute("x-watch-start") == {
        "page-size": PAGE_SIZE,
        "blocks": [
            {"name": "ram", "size": RAM_PAGES * PAGE_SIZE, "pages": RAM_PAGES, "stored": served.stored("ram")},
            {"name": "rom", "size": ROM_PAGES * PAGE_SIZE, "pages": ROM_PAGES, "stored": served.stored("rom")},
        ],
    }
    served.guest.resume()
    wait_for_rounds(served.guest, 3)
    sample = msgspec.convert(qmp.execute("x-watch-sample"), SampleInfo)
    ram, rom = sample.blocks
    assert (ram.name, ram.written, rom.name, rom.written, rom.bitmap) == ("ram", len(WRITTEN), "rom", 0, b"")
    assert set(unpack(ram.bitmap, RAM_PAGES).indices().tolist()) == WRITTEN


def test_watch_that_is_stopped_logs_no_more_and_may_begin_again(served: Served, qmp: QMPClient) -> None:
    served.guest.resume()
    for _ in range(3):
        qmp.execute("x-watch-start")
        assert served.tracking() == TrackingReason.DIRTY_RATE
        qmp.execute("x-watch-stop")
        assert not served.tracking()


def test_session_that_ends_ends_its_watch(served: Served) -> None:
    served.guest.resume()
    with QMPClient(served.path) as client:
        client.execute("x-watch-start")
        assert served.tracking() == TrackingReason.DIRTY_RATE
    wait_until(lambda: not served.tracking(), "nothing was logged any more")


def test_sessions_watch_beside_each_other(served: Served, qmp: QMPClient) -> None:
    served.guest.resume()
    with QMPClient(served.path) as other:
        mine, others = RemoteWatch(qmp), RemoteWatch(other)
        wait_for_rounds(served.guest, 3)
        assert set(mine.sample().written["ram"].indices().tolist()) == WRITTEN
        assert set(others.sample().written["ram"].indices().tolist()) == WRITTEN
        others.close()
        wait_for_rounds(served.guest, 3)
        assert set(mine.sample().written["ram"].indices().tolist()) == WRITTEN
    assert served.tracking() == TrackingReason.DIRTY_RATE


def _refusal(qmp: QMPClient, command: str) -> str:
    with pytest.raises(QMPCommandError) as caught:
        qmp.execute(command)
    return caught.value.desc


def test_second_watch_of_a_session_is_refused_and_the_first_goes_on(served: Served, qmp: QMPClient) -> None:
    watch = RemoteWatch(qmp)
    assert "has a watch already; end it with x-watch-stop" in _refusal(qmp, "x-watch-start")
    assert watch.sample().pages == 0


@pytest.mark.parametrize("command", ["x-watch-sample", "x-watch-stop"])
def test_what_needs_a_watch_is_refused_without(served: Served, qmp: QMPClient, command: str) -> None:
    assert "has no watch; begin one with x-watch-start" in _refusal(qmp, command)
    qmp.execute("x-watch-start")
    qmp.execute("x-watch-stop")
    assert "has no watch" in _refusal(qmp, command)


def test_memory_whose_sample_fits_into_no_message_is_refused(
    served: Served, qmp: QMPClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_commands, "MAX_MESSAGE", 2000)
    assert "of memory are too much to be watched over QMP" in _refusal(qmp, "x-watch-start")
    assert not served.tracking()


@pytest.mark.parametrize(("gib", "fits"), [(256, True), (350, True), (400, False)])
def test_a_quarter_of_a_tebibyte_can_be_watched(gib: int, fits: bool) -> None:
    blocks: dict[str, Any] = {"pc.ram": gib << 18, "pc.bios": 64}
    if fits:
        watch_commands._check_size(blocks)
    else:
        with pytest.raises(DirtylogError, match="too much"):
            watch_commands._check_size(blocks)
