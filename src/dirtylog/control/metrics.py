"""A machine's numbers for Prometheus, over HTTP.

They are read when somebody asks, from what a migration writes down anyway: nothing is counted for them, and nobody
waits for a lock.
"""

import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, Self

from dirtylog.control.controller import Controller
from dirtylog.control.migration_info import MigrationInfo, describe
from dirtylog.errors import HostError, UsageError
from dirtylog.machine import RunState
from dirtylog.migration import Status
from dirtylog.units import MIB

if TYPE_CHECKING:
    from prometheus_client.core import Metric

LOOPBACK: Final = "127.0.0.1"
_END_TIMEOUT: Final = 5.0


def parse_endpoint(text: str) -> tuple[str, int]:
    """Host and port of ``PORT`` or ``HOST:PORT``; this host alone unless told otherwise.

    Raises:
        UsageError: it is neither.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if colon else LOOPBACK
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 0xFFFF:
        raise UsageError(
            f"{text!r} is no place to serve metrics at", remedy="give a port, or a host and a port like 0.0.0.0:9400"
        )
    return host, int(port)


class MetricsServer:
    """Serves a controller's numbers at ``/metrics``, from when it is made until it is closed.

    Args:
        controller: of the machine.
        host: address or name to listen at. Whoever can connect there can read them.
        port: 0 for any.

    Attributes:
        url: where they are.

    Raises:
        HostError: prometheus-client is not installed, or nothing can listen there.
    """

    def __init__(self, controller: Controller, host: str, port: int) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as error:
            raise HostError("metrics need prometheus-client", remedy="pip install 'dirtylog[metrics]'") from error
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Numbers(controller))
        self._thread: threading.Thread | None = None
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise HostError(
                f"metrics cannot be served at {host}, port {port}: {error.strerror}", remedy="choose another place"
            ) from error
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self._server.server_port}/metrics"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Serve no more; idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._server.shutdown()
            self._server.server_close()
            thread.join(_END_TIMEOUT)


class _Numbers:
    """Collects what there is to tell, anew for each scrape."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def collect(self) -> "Iterator[Metric]":
        """For prometheus-client."""
        yield from self._of_machine()
        outgoing = self._controller.outgoing
        if outgoing is not None:
            info = describe(outgoing)
            yield _states("migration_status", "Whether the last migration is in a status.", Status, info.status)
            yield from _of_migration(info)

    def _of_machine(self) -> "Iterator[Metric]":
        machine, rate = self._controller.machine, self._controller.rate_meter.last.rate
        yield _states("run_state", "Whether the machine is in a state.", RunState, machine.state.value)
        size = sum(block.size for block in tuple(machine.memory.blocks.values()))
        yield _gauge("memory_bytes", "RAM of the machine.", size)
        yield _gauge("throttle_ratio", "The share of its time that is taken from the guest.", machine.throttled)
        if rate is not None and rate >= 0:
            yield _gauge("dirty_rate_bytes", "Memory dirtied a second, when calc-dirty-rate last measured.", rate * MIB)
        limits = machine.dirty_limits
        if limits:
            text = "What a vCPU may dirty a second."
            yield _labelled("vcpu_dirty_limit_bytes", text, "cpu", ((str(one.cpu), one.quota * MIB) for one in limits))
            text = "What a vCPU with a limit dirtied a second lately."
            yield _labelled("vcpu_dirty_rate_bytes", text, "cpu", ((str(one.cpu), one.rate * MIB) for one in limits))


def _of_migration(info: MigrationInfo) -> "Iterator[Metric]":
    ram, verdict = info.ram, info.x_verdict
    yield _gauge("migration_dirty_rate_bytes", "Memory dirtied a second.", ram.dirty_pages_rate * ram.page_size)
    yield _gauge("migration_remaining_bytes", "Memory to be sent in this pass.", ram.remaining)
    yield _gauge("migration_sent_bytes", "Bytes sent.", ram.transferred)
    yield _gauge("migration_bandwidth_bytes", "Bytes sent a second.", ram.mbps * 1e6 / 8)
    yield _gauge("migration_passes", "Passes over memory that were begun.", ram.dirty_sync_count)
    yield _gauge("migration_seconds", "How long it has taken.", info.total_time / 1e3)
    yield _gauge("migration_throttle_ratio", "The share that it takes from the guest.", _ratio(info))
    if info.expected_downtime is not None:
        text = "How long the guest would stand still now."
        yield _gauge("migration_expected_downtime_seconds", text, info.expected_downtime / 1e3)
    if info.x_downtime_us is not None:
        yield _gauge("migration_downtime_seconds", "How long the guest stood still.", info.x_downtime_us / 1e6)
    if verdict is not None and verdict.converges is not None:
        yield _gauge("migration_converges", "Whether it will come to an end as it is.", verdict.converges)


def _ratio(info: MigrationInfo) -> float:
    return (info.cpu_throttle_percentage or 0) / 100


def _gauge(name: str, text: str, value: float) -> "Metric":
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(f"dirtylog_{name}", text, value=value)


def _labelled(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> "Metric":
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"dirtylog_{name}", text, labels=[label])
    for key, value in values:
        family.add_metric([key], value)
    return family


def _states(name: str, text: str, states: type[RunState] | type[Status], now: str) -> "Metric":
    values = ((state.value, float(state.value == now)) for state in states)
    return _labelled(name, text, name.rpartition("_")[2], values)
