"""``dirtylog watch`` and guests in processes of their own."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from support.closed_form import distinct_pages
from support.dirtier_runs import ENDLESS, RANGE, Place
from support.processes import Process, Run, dirtylog
from support.waiting import wait_until

from dirtylog.control.qmp import QMPClient
from dirtylog.control.watch import RemoteWatch
from dirtylog.display import TraceReader
from dirtylog.guests import random_writer
from dirtylog.guests.dirtier import COUNTER_ADDRESS
from dirtylog.units import MIB, PAGE_SIZE

pytestmark = pytest.mark.usefixtures("kvm")

RAM: Final = "pc.ram"
WRITTEN: Final = {*range(RANGE[0] // PAGE_SIZE, RANGE[1] // PAGE_SIZE), COUNTER_ADDRESS // PAGE_SIZE}
"""What the dirtier writes in a round, of which it makes many in the time of a sample."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def source(place: Place) -> Iterator[Run]:
    with place.source() as source:
        place.wait_for_round(source)
        yield source


def tracking(run: Run) -> Any:
    return run.qmp.execute("x-query-memory")["tracking"]


def samples(watch: Process) -> list[dict[str, Any]]:
    """What it has told so far, but for a line that is not whole yet."""
    return [json.loads(line) for line in watch.out.splitlines(keepends=True) if line.endswith("\n")]


def test_machine_is_found_by_its_process_and_its_writes_are_told_and_recorded(place: Place, source: Run) -> None:
    trace = Path(place.path("trace"))
    with dirtylog(
        "watch", str(source.pid), "--interval", "200ms", "--duration", "1s", "--json", "--record", str(trace)
    ) as watch:
        assert watch.wait() == 0, watch.err
        told = samples(watch)
    assert [sample["status"] for sample in told] == ["running"] * len(told)
    assert told[-1]["time"] >= 1
    recorded = list(TraceReader(trace))
    assert [sample.pages for sample in recorded] == [sample["pages"] for sample in told]
    written = set().union(*(sample.written[RAM].indices().tolist() for sample in recorded))
    assert written == WRITTEN
    assert tracking(source) == []
    place.check_runs_on(source)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_viewer_that_is_killed_leaves_no_logging_on(place: Place, source: Run, number: signal.Signals) -> None:
    trace = Path(place.path("trace"))
    with dirtylog("watch", place.path("source.qmp"), "--interval", "20ms", "--record", str(trace)) as watch:
        wait_until(lambda: trace.exists() and trace.stat().st_size > 1000, "some samples were recorded")
        assert tracking(source) == ["dirty_rate"]
        watch.signal(number)
        assert watch.wait() == (130 if number is signal.SIGINT else -signal.SIGKILL)
    wait_until(lambda: tracking(source) == [], "logging was off")
    assert len(list(TraceReader(trace))) > 1
    place.check_runs_on(source)


def test_end_of_the_machine_ends_the_watch(place: Place, source: Run) -> None:
    with dirtylog("watch", place.path("source.qmp"), "--interval", "20ms", "--json") as watch:
        wait_until(lambda: samples(watch), "a sample was told")
        source.qmp.execute("quit")
        assert watch.wait() == 5
        assert watch.err == f"dirtylog: error: the machine of {place.path('source.qmp')} has ended\n"
        assert source.wait() == 0


def test_watch_and_migration_both_have_every_page(place: Place, source: Run) -> None:  # D4
    uri = f"unix:{place.path('m')}"
    with (
        place.destination(uri) as destination,
        dirtylog("watch", place.path("source.qmp"), "--interval", "10ms", "--json") as watch,
    ):
        wait_until(lambda: samples(watch), "a sample was told")
        with dirtylog("migrate", place.path("source.qmp"), uri, *ENDLESS) as migration:
            wait_until(lambda: len(source.qmp.execute("query-migrate").get("x-passes", ())) > 2, "passes were sent")
            assert sorted(tracking(source)) == ["dirty_rate", "migration"]
            before = len(samples(watch))
            wait_until(lambda: len(samples(watch)) > before + 5, "it was watched meanwhile")
            assert sum(sample["pages"] for sample in samples(watch)[before:]) > 0
            source.qmp.execute("migrate-set-parameters", downtime_limit=2000, max_bandwidth=0)
            assert migration.wait() == 0, migration.err
        wait_until(lambda: samples(watch)[-1]["status"] == "postmigrate", "the watch saw it go")
        place.check_memory(source)
        place.check_runs_on(destination)
        assert watch.running


class RandomWriter:
    """``dirtylog run`` with the random writer, and the number of its writes at any moment."""

    FIRST, LAST = 1 * MIB, 17 * MIB
    PAGES = (LAST - FIRST) // PAGE_SIZE

    def __init__(self, run: Run, directory: Path) -> None:
        self.run = run
        self.qmp = directory / "random.qmp"
        self._dump = directory / "dump"

    def writes(self) -> int:
        return int.from_bytes(self.run.memory(random_writer.COUNTER_ADDRESS, 8, self._dump), "little")

    def wait_for(self, more: int) -> None:
        wanted = self.writes() + more
        wait_until(lambda: self.writes() >= wanted, "the guest wrote on")


@pytest.fixture
def random_guest(tmp_path: Path) -> Iterator[RandomWriter]:
    image = tmp_path / "random.img"
    with dirtylog("guest", str(image), "--pattern", "random", "--last", "17M") as command:
        assert command.wait() == 0, command.err
    with Run(tmp_path / "random.qmp", str(image), "--memory", "24M") as run:
        guest = RandomWriter(run, tmp_path)
        guest.wait_for(1)
        yield guest


def test_rate_of_a_random_writer_follows_the_closed_form(random_guest: RandomWriter) -> None:
    guest = random_guest
    size = guest.PAGES * PAGE_SIZE

    def rate(writes: int, seconds: float, sigmas: int) -> float:
        # size * (1 - (1 - 4096 / size) ** (t * writes_per_second)) / t, and so many standard deviations more
        assert distinct_pages(guest.PAGES, writes).mean * PAGE_SIZE == pytest.approx(
            size * (1 - (1 - PAGE_SIZE / size) ** writes)
        )
        expected = distinct_pages(guest.PAGES, writes)
        return (expected.mean + sigmas * expected.deviation) * PAGE_SIZE / seconds

    with QMPClient(guest.qmp) as qmp:
        earliest = guest.writes()
        watch = RemoteWatch(qmp)
        latest = guest.writes() + 1  # one may be made and not counted yet
        for more in (guest.PAGES // 4, guest.PAGES, 3 * guest.PAGES):
            guest.wait_for(more)
            before = guest.writes()
            sample = watch.sample()
            after = guest.writes() + 1
            found = sample.written[RAM].count(guest.FIRST // PAGE_SIZE, guest.PAGES) * PAGE_SIZE / sample.seconds
            least, most = rate(before - latest, sample.seconds, -6), rate(after - earliest, sample.seconds, 6)
            assert least <= found <= most
            earliest, latest = before, after
