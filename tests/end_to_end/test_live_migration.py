import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from support.dirtier_runs import ENDLESS, Place
from support.processes import Process, Run, dirtylog
from support.waiting import wait_until

from dirtylog.units import MIB

pytestmark = pytest.mark.usefixtures("kvm")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def _uri(run: Run) -> str:
    """Where a destination waits."""
    wait_until(lambda: "\n" in run.err, "the destination said where it waits")
    return run.err.splitlines()[0].rpartition(" ")[2]


@contextmanager
def _pair(place: Place, *options: str, uri: str | None = None) -> Iterator[tuple[Run, Run]]:
    with place.source(*options) as source, place.destination(uri or f"unix:{place.path('m')}", *options) as destination:
        place.wait_for_round(source)
        yield source, destination


def _migrate(place: Place, uri: str, *options: str) -> Process:
    return dirtylog("migrate", place.path("source.qmp"), uri, *options)


def _stops_cleanly(run: Run, number: signal.Signals) -> None:
    run.signal(number)
    assert run.wait() == 0, run.err


def _migrates(place: Place, source: Run, name: str = "second") -> None:
    """A migration to a fresh destination works."""
    uri = f"unix:{place.path(name)}"
    with place.destination(uri, name=f"{name}-destination") as destination:
        with _migrate(place, uri, "--verify") as migration:
            assert migration.wait() == 0, migration.err
        assert source.state == "postmigrate"
        place.check_runs_on(destination)


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        (None, ("--dirty-log", "legacy")),
        (None, ("--dirty-log", "manual")),
        (None, ("--dirty-log", "initially-set", "--cpus", "2")),
        (None, ("--dirty-log", "ring", "--dirty-ring-size", "4096", "--cpus", "2")),
        ("tcp:127.0.0.1:0", ()),
    ],
    ids=["unix-legacy", "unix-manual", "unix-initially-set", "unix-ring", "tcp"],
)
def test_guest_moves_to_another_process_and_runs_on(place: Place, uri: str | None, options: tuple[str, ...]) -> None:
    with _pair(place, *options, uri=uri) as (source, destination):
        with _migrate(place, _uri(destination), "--verify", "--json") as migration:
            assert migration.wait() == 0, migration.err
            report = msgspec.json.decode(migration.out)
        assert report["status"] == "completed"
        assert len(report["x-digests"]["pc.ram"]) == 64
        assert source.state == "postmigrate"
        place.check_memory(source)
        assert place.rounds(destination) >= place.rounds(source)
        place.check_runs_on(destination)
        _stops_cleanly(source, signal.SIGTERM)
        _stops_cleanly(destination, signal.SIGINT)
        assert source.err == ""
        assert source.out.startswith("AB")
        assert set(destination.out) == {"B"}
    assert place.left() == []


@pytest.mark.parametrize(
    ("options", "multifd"),
    [
        (("--channels", "2"), True),
        (("--channels", "2", "--bandwidth", "64M"), True),
        (("--bandwidth", "64M", "--delta-cache", "1M"), False),
        (("--channels", "4", "--compression", "none", "--delta-cache", "0"), True),
    ],
    ids=["two-channels", "all-on-a-slow-link", "small-cache-on-a-slow-link", "nothing-but-channels"],
)
def test_guest_moves_in_every_way_and_runs_on(place: Place, options: tuple[str, ...], multifd: bool) -> None:
    with _pair(place, "--cpus", "2") as (source, destination):
        with _migrate(place, _uri(destination), "--verify", "--json", *options) as migration:
            assert migration.wait() == 0, migration.err
            report = msgspec.json.decode(migration.out)
        ways = report["x-ways"]
        assert sum(way["pages"] for way in ways.values()) == report["ram"]["normal"]
        assert (report["ram"]["multifd-bytes"] > 0) is multifd
        if "64M" in options:  # what the dirtier writes is nearly all zeros
            assert sum(way["saved"] for way in ways.values()) > 0.2 * report["ram"]["normal-bytes"]
        if "none" in options:
            assert ways.keys() == {"plain"}
        assert source.state == "postmigrate"
        place.check_runs_on(destination)
        assert destination.err.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [("--dirty-log", "initially-set", "--cpus", "2"), ("--dirty-log", "ring"), ("--accel", "unicorn")],
    ids=["initially-set", "ring", "unicorn"],
)
def test_guest_is_handed_over_with_its_memory_and_runs_on(place: Place, options: tuple[str, ...]) -> None:
    with _pair(place, *options) as (source, destination):
        before = place.rounds(source)
        with _migrate(place, _uri(destination), "--local", "--verify", "--json") as migration:
            assert migration.wait() == 0, migration.err
            report = msgspec.json.decode(migration.out)
        assert (report["status"], report["ram"]["transferred"], report["x-passes"]) == ("completed", 0, [])
        assert len(report["x-digests"]["pc.ram"]) == 64
        wait_until(lambda: source.state == "postmigrate", "the source has let go of the memory")
        assert place.rounds(source) == 0
        assert place.rounds(destination) >= before
        place.check_runs_on(destination)
        uri = f"unix:{place.path('further')}"
        with place.destination(uri, *options, name="further") as further:
            with dirtylog("migrate", place.path("destination.qmp"), uri, "--verify") as migration:
                assert migration.wait() == 0, migration.err
            place.check_runs_on(further)
            _stops_cleanly(further, signal.SIGTERM)
        _stops_cleanly(source, signal.SIGTERM)
        _stops_cleanly(destination, signal.SIGINT)
        assert source.err == ""
    assert place.left() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_stops_a_running_guest_cleanly(place: Place, number: signal.Signals) -> None:
    with place.source() as source:
        place.wait_for_round(source)
        _stops_cleanly(source, number)
        assert source.err == ""
    assert place.left() == []


def test_signal_stops_a_waiting_destination_cleanly(place: Place) -> None:
    with place.destination(f"unix:{place.path('m')}") as destination:
        where = _uri(destination)
        _stops_cleanly(destination, signal.SIGTERM)
        assert destination.err == f"dirtylog: waiting for a guest at {where}\n"
    assert place.left() == []


@contextmanager
def _under_way(place: Place, options: tuple[str, ...] = ENDLESS) -> Iterator[tuple[Run, Run, Process]]:
    """A migration that sends and does not end."""
    with _pair(place) as (source, destination), _migrate(place, _uri(destination), *options) as migration:
        wait_until(lambda: len(source.qmp.execute("query-migrate").get("x-passes", ())) > 1, "a pass was sent")
        yield source, destination, migration


def _line(text: str) -> str:
    """What an error said, which must be one line, and one more for the remedy."""
    lines = [line for line in text.splitlines() if not line.startswith("dirtylog: waiting")]
    assert lines, text
    assert lines[0].startswith("dirtylog: error: "), text
    assert lines[1:] == [] or (len(lines) == 2 and lines[1].startswith("  remedy: ")), text
    return lines[0].removeprefix("dirtylog: error: ")


_EITHER = pytest.mark.parametrize(
    "options", [ENDLESS, (*ENDLESS, "--channels", "3")], ids=["one-channel", "three-channels"]
)


@_EITHER
def test_destination_that_is_killed_leaves_the_guest_running(place: Place, options: tuple[str, ...]) -> None:  # M2
    with _under_way(place, options) as (source, destination, migration):
        destination.kill()
        assert migration.wait() == 5
        assert _line(migration.err).startswith(
            "the migration failed, the guest is running on the source: the connection to the destination ended"
        )
        place.check_runs_on(source)
        _migrates(place, source)


@_EITHER
def test_source_that_is_killed_ends_the_destination_without_the_guest(
    place: Place, options: tuple[str, ...]
) -> None:  # M6
    with _under_way(place, options) as (source, destination, migration):
        source.kill()
        assert destination.wait() == 5
        assert re.fullmatch(  # a connection is reset if the source has not read all that it was told
            "the connection to the source ended before the migration did(: Connection reset by peer|: Broken pipe)?;"
            " the guest was not handed over and is not started here",
            _line(destination.err),
        )
        assert destination.out == ""
        assert migration.wait() == 5
        _line(migration.err)


@_EITHER
def test_interrupted_migration_leaves_the_guest_running(place: Place, options: tuple[str, ...]) -> None:  # M2
    with _under_way(place, options) as (source, destination, migration):
        migration.signal(signal.SIGINT)
        assert migration.wait() == 130
        line = _line(migration.err)  # on a slow host with a verdict, after a pass or more
        assert line.startswith("the migration was cancelled")
        assert line.endswith("; the guest is running on the source")
        assert destination.wait() == 5
        _line(destination.err)
        place.check_runs_on(source)
        _migrates(place, source)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_side_that_is_stopped_during_a_migration_ends_cleanly_and_at_once(place: Place, side: str) -> None:
    with _under_way(place) as (source, destination, migration):
        if side == "source":
            _stops_cleanly(source, signal.SIGTERM)
            assert destination.wait() == 5
            _line(destination.err)
        else:
            _stops_cleanly(destination, signal.SIGTERM)
            assert migration.wait() == 5
            place.check_runs_on(source)
        assert migration.wait() != 0
        _line(migration.err)
        assert destination.out == ""


def test_destination_with_other_memory_refuses_says_why_and_waits_on(place: Place) -> None:  # M10
    uri = f"unix:{place.path('m')}"
    with place.source() as source, Run(Path(place.path("d.qmp")), "--incoming", uri, "--memory", "8M") as destination:
        with _migrate(place, uri) as migration:
            assert migration.wait() == 5
            assert _line(migration.err).endswith(
                "the destination gave up: the source's memory is pc.ram of 16.0 MiB, this machine's is pc.ram of"
                " 8.0 MiB; start both sides with the same --memory"
            )
        assert destination.state == "inmigrate"
        *_, line = destination.err.splitlines()
        assert line.startswith("dirtylog: refused a connection from process ")
        assert ": the source's memory is pc.ram of 16.0 MiB" in line
        place.check_runs_on(source)


def test_nobody_at_the_address_is_told_with_the_remedy(place: Place) -> None:
    with place.source() as source, _migrate(place, f"unix:{place.path('nobody')}") as migration:
        assert migration.wait() == 5
        assert _line(migration.err).startswith(
            "the migration failed, the guest is running on the source: cannot connect to the destination at unix:"
        )
        assert "dirtylog run --incoming" in migration.err
        place.check_runs_on(source)


def test_each_process_needs_less_than_100_mib_beside_the_guests_ram(place: Place) -> None:
    with _pair(place) as (source, destination):
        with _migrate(place, _uri(destination)) as migration:
            assert migration.wait() == 0, migration.err
        for run in (source, destination):
            assert _beside_guest_ram(run.pid) < 100 * MIB


def _beside_guest_ram(pid: int) -> int:
    """Resident bytes that are no shared memory: the guest's RAM is a memfd."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(1024 * int(size) for size in re.findall(r"Rss(?:Anon|File):\s+(\d+) kB", status))
