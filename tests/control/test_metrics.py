import builtins
import http.client
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.fake_machine import RAM_PAGES, ROM_PAGES, FakeMachine
from support.guests import machine, wait_for_rounds
from support.waiting import wait_until

from dirtylog.control.controller import Controller
from dirtylog.control.metrics import LOOPBACK, MetricsServer, parse_endpoint
from dirtylog.control.settings import Capability
from dirtylog.display import RateMode, RateStatus
from dirtylog.errors import HostError, UsageError
from dirtylog.machine import DirtyLimit
from dirtylog.migration import IncomingMigration, Listener, Statistics, Status, Verdict, parse_address
from dirtylog.migration.statistics import PassStatistics
from dirtylog.units import MIB, PAGE_SIZE

Scraped = dict[tuple[str, tuple[str, ...]], float]


class Served:
    def __init__(self, stack: ExitStack) -> None:
        guest = stack.enter_context(machine("fake", boot=True))
        assert isinstance(guest, FakeMachine)
        self.guest = guest
        self.controller = Controller(guest)
        stack.callback(self.controller.close)
        self.server = stack.enter_context(MetricsServer(self.controller, LOOPBACK, 0))

    def scrape(self) -> Scraped:
        host, _, rest = self.server.url.removeprefix("http://").partition(":")
        port, _, path = rest.partition("/")
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", f"/{path}")
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        assert answer.status == 200
        found: Scraped = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation.endswith(".")
            for sample in family.samples:
                found[sample.name.removeprefix("dirtylog_"), tuple(sample.labels.values())] = sample.value
        return found

    def number(self, name: str, *labels: str) -> float | None:
        return self.scrape().get((name, labels))


@pytest.fixture
def served() -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(stack)


def test_machine_is_told_of_before_any_migration(served: Served) -> None:
    found = served.scrape()
    assert found["memory_bytes", ()] == (RAM_PAGES + ROM_PAGES) * PAGE_SIZE
    assert found["throttle_ratio", ()] == 0
    assert found["run_state", ("prelaunch",)] == 1
    assert sum(value for (name, _), value in found.items() if name == "run_state") == 1
    assert not [name for name, _ in found if name.startswith(("migration", "dirty_rate", "vcpu"))]
    served.guest.resume()
    served.guest.throttle(0.25)
    found = served.scrape()
    assert (found["run_state", ("running",)], found["run_state", ("prelaunch",)]) == (1, 0)
    assert found["throttle_ratio", ()] == 0.25


def test_migration_is_told_of_as_query_migrate_tells_it(served: Served, tmp_path: Path) -> None:
    listener = Listener(parse_address(f"unix:{tmp_path}/silent"))
    served.controller.migrate(str(listener.address))
    outgoing = served.controller.outgoing
    assert outgoing is not None
    served.controller.cancel_migration()
    wait_until(lambda: outgoing.ended, "the migration ended")
    listener.close()
    outgoing.status = Status.ACTIVE
    outgoing.statistics = Statistics(
        remaining_pages=10,
        dirty_rate=256.0,
        throttle=30,
        verdict=Verdict(False, 0.0, 0.0, 0.0, 0.0, 0.0),
        passes=[PassStatistics(7, bytes=5 * MIB, seconds=1.0, bandwidth=2e6, expected_downtime=0.25)],
    )
    found = served.scrape()
    assert {name: value for (name, labels), value in found.items() if name.startswith("migration") and not labels} == {
        "migration_dirty_rate_bytes": MIB,
        "migration_remaining_bytes": 10 * PAGE_SIZE,
        "migration_sent_bytes": 5 * MIB,
        "migration_bandwidth_bytes": 2e6,
        "migration_passes": 7,
        "migration_seconds": pytest.approx(outgoing.elapsed, abs=5),
        "migration_throttle_ratio": 0.3,
        "migration_expected_downtime_seconds": 0.25,
        "migration_converges": 0,
    }
    assert (found["migration_status", ("active",)], found["migration_status", ("completed",)]) == (1, 0)


def test_completed_migration_tells_its_downtime(served: Served, tmp_path: Path) -> None:
    with ExitStack() as stack:
        there = stack.enter_context(machine("fake", boot=False))
        listener = Listener(parse_address(f"unix:{tmp_path}/m"))
        incoming = threading.Thread(target=IncomingMigration(there, listener).run)
        incoming.start()
        served.guest.resume()
        wait_for_rounds(served.guest)
        served.controller.migrate(str(listener.address))
        wait_until(lambda: served.number("migration_status", "completed") == 1, "the migration completed")
        incoming.join()
        found = served.scrape()
        assert 0 < found["migration_downtime_seconds", ()] < 30
        assert found["run_state", ("postmigrate",)] == 1


def test_measured_rate_and_limits_are_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.controller.rate_meter.start(RateMode.DIRTY_BITMAP, 0.05)
    wait_until(lambda: served.controller.rate_meter.last.status is RateStatus.MEASURED, "it was measured")
    assert served.number("dirty_rate_bytes") == (served.controller.rate_meter.last.rate or 0) * MIB
    limits = (DirtyLimit(cpu=1, quota=5, rate=3), DirtyLimit(cpu=4, quota=6))
    monkeypatch.setattr(FakeMachine, "dirty_limits", limits)
    found = served.scrape()
    assert (found["vcpu_dirty_limit_bytes", ("1",)], found["vcpu_dirty_rate_bytes", ("1",)]) == (5 * MIB, 3 * MIB)
    assert (found["vcpu_dirty_limit_bytes", ("4",)], found["vcpu_dirty_rate_bytes", ("4",)]) == (6 * MIB, 0)


def test_reading_takes_no_lock_of_the_machine_or_its_migrations(served: Served) -> None:
    served.guest.resume()
    with served.controller._lock, served.guest._state_lock, served.guest._throttle_lock, served.guest._lock:
        assert served.number("run_state", "running") == 1
    served.controller.change_capabilities({Capability.EVENTS: True})


def test_close_is_idempotent_and_frees_the_port() -> None:
    with ExitStack() as stack:
        served = Served(stack)
        port = int(served.server.url.rpartition(":")[2].partition("/")[0])
        served.server.close()
        served.server.close()
        with MetricsServer(served.controller, LOOPBACK, port) as again:
            assert again.url == served.server.url


def test_place_that_is_taken_is_a_host_error(served: Served) -> None:
    port = int(served.server.url.rpartition(":")[2].partition("/")[0])
    with pytest.raises(
        HostError, match=f"cannot be served at 127.0.0.1, port {port}: Address already in use"
    ) as caught:
        MetricsServer(served.controller, LOOPBACK, port)
    assert caught.value.remedy


def test_missing_extra_is_named(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return imported(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "prometheus_client", raising=False)
    with pytest.raises(HostError, match="metrics need prometheus-client") as caught:
        MetricsServer(served.controller, LOOPBACK, 0)
    assert caught.value.remedy == "pip install 'dirtylog[metrics]'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9400", ("127.0.0.1", 9400)),
        ("0", ("127.0.0.1", 0)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),  # noqa: S104 - not listened at
        ("name:1", ("name", 1)),
        ("[::1]:9400", ("::1", 9400)),
    ],
)
def test_place_is_a_port_and_perhaps_a_host(text: str, expected: tuple[str, int]) -> None:
    assert parse_endpoint(text) == expected


@pytest.mark.parametrize("text", ["", "host", ":9400", "host:", "-1", "65536", "host:http", "9400:", "\u0661"])
def test_other_places_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no place to serve metrics at") as caught:
        parse_endpoint(text)
    assert caught.value.remedy
