"""The commands that measure and limit how fast memory is written, against QEMU where it is there."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.fake_machine import FakeMachine
from support.guests import machine
from support.require import require
from support.running import Running
from support.waiting import BOUND, wait_until

from dirtylog.control.commands import Commands
from dirtylog.control.controller import Controller
from dirtylog.control.qmp import CommandRegistry, QMPClient, QMPCommandError
from dirtylog.control.qmp.messages import QMPError, Success, encode
from dirtylog.control.settings import Capability
from dirtylog.errors import DirtylogError, UsageError
from dirtylog.linux.kvm import KVM
from dirtylog.linux.kvm_abi import Capability as KVMCapability
from dirtylog.migration import Listener, parse_address
from dirtylog.trackers import KVMLogMode
from dirtylog.units import MIB

QEMU = shutil.which("qemu-system-x86_64")


class Served:
    """A machine's commands, without a connection."""

    def __init__(self, stack: ExitStack, machine: Any) -> None:
        self.machine = machine
        self.controller = Controller(machine)
        stack.callback(self.controller.close)
        self._registry = CommandRegistry()
        self._scope = stack
        Commands(self.controller).register(self._registry)

    def execute(self, name: str, **arguments: object) -> Any:
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        command = self._registry.find(name)
        return json.loads(encode(Success(command.run(command.parse(given), self._scope))))["return"]

    def measured(self) -> Any:
        wait_until(lambda: self.execute("query-dirty-rate")["status"] == "measured", "it was measured")
        return self.execute("query-dirty-rate")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def fake(stack: ExitStack) -> Served:
    made = stack.enter_context(machine("fake", boot=True))
    assert isinstance(made, FakeMachine)
    return Served(stack, made)


@pytest.fixture
def ring(kvm: KVM, stack: ExitStack) -> Served:
    """Two vCPUs, of which the first writes 256 pages round after round."""
    require("kvm", kvm.check(KVMCapability.DIRTY_LOG_RING), "this kernel's KVM has no dirty rings")
    running = Running(8 * MIB, cpus=2, log_mode=KVMLogMode.RING)
    running.boot_dirtier()
    served = Served(stack, running.machine)
    running.machine.resume()
    return served


def test_nothing_was_measured_at_first(fake: Served) -> None:
    assert fake.execute("query-dirty-rate") == {
        "status": "unstarted",
        "start-time": 0,
        "calc-time": 0,
        "calc-time-unit": "second",
        "sample-pages": 0,
        "mode": "page-sampling",
    }


def test_measurement_is_described_while_it_lasts_and_afterwards(fake: Served) -> None:
    fake.machine.resume()
    before = int(time.time())
    assert fake.execute("calc-dirty-rate", calc_time=1500, calc_time_unit="millisecond", mode="dirty-bitmap") is None
    begun = fake.execute("query-dirty-rate", calc_time_unit="millisecond")
    assert begun.pop("start-time") >= before
    assert begun == {
        "status": "measuring",
        "calc-time": 1500,
        "calc-time-unit": "millisecond",
        "sample-pages": 0,
        "mode": "dirty-bitmap",
    }
    with pytest.raises(UsageError, match="is being measured already"):
        fake.execute("calc-dirty-rate", calc_time=1)
    result = fake.measured()
    assert (result["calc-time"], result["calc-time-unit"]) == (1, "second")
    assert result["dirty-rate"] >= 0


def test_page_sampling_is_the_default_and_tells_how_many_pages(fake: Served) -> None:
    fake.execute("calc-dirty-rate", calc_time=50, calc_time_unit="millisecond")
    assert (fake.measured()["mode"], fake.measured()["sample-pages"]) == ("page-sampling", 512)
    fake.execute("calc-dirty-rate", calc_time=50, calc_time_unit="millisecond", sample_pages=128)
    result = fake.measured()
    assert (result["sample-pages"], result["dirty-rate"]) == (128, -1)  # the fake's memory is too small for a sample


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"calc_time": 0},
        {"calc_time": 61},
        {"calc_time": -1},
        {"calc_time": 1.5},
        {"calc_time": 49, "calc_time_unit": "millisecond"},
        {"calc_time": 60001, "calc_time_unit": "millisecond"},
        {"calc_time": 1, "calc_time_unit": "minute"},
        {"calc_time": 1, "sample_pages": 127},
        {"calc_time": 1, "sample_pages": 16385},
        {"calc_time": 1, "mode": "nonsense"},
        {"calc_time": 1, "mode": "dirty-ring"},
        {"calc_time": 1, "mode": "dirty-bitmap", "sample_pages": 512},
    ],
)
def test_measurement_that_cannot_be_is_refused(fake: Served, arguments: dict[str, object]) -> None:
    with pytest.raises(DirtylogError):
        fake.execute("calc-dirty-rate", **arguments)
    assert fake.execute("query-dirty-rate")["status"] == "unstarted"


def test_rate_of_each_vcpu_is_told_where_there_are_rings(ring: Served) -> None:
    with pytest.raises(UsageError, match="has no dirty bitmap"):
        ring.execute("calc-dirty-rate", calc_time=1, mode="dirty-bitmap")
    ring.execute("calc-dirty-rate", calc_time=500, calc_time_unit="millisecond", mode="dirty-ring")
    result = ring.measured()
    assert [one["id"] for one in result["vcpu-dirty-rate"]] == [0, 1]
    assert result["dirty-rate"] == sum(one["dirty-rate"] for one in result["vcpu-dirty-rate"]) > 0
    assert result["vcpu-dirty-rate"][1]["dirty-rate"] == 0


def test_limits_are_set_told_and_cancelled(ring: Served) -> None:
    assert ring.execute("query-vcpu-dirty-limit") == []
    ring.execute("set-vcpu-dirty-limit", dirty_rate=100)
    ring.execute("set-vcpu-dirty-limit", dirty_rate=7, cpu_index=1)
    told = ring.execute("query-vcpu-dirty-limit")
    assert [(one["cpu-index"], one["limit-rate"]) for one in told] == [(0, 100), (1, 7)]
    assert all(one["current-rate"] >= 0 for one in told)
    ring.execute("cancel-vcpu-dirty-limit", cpu_index=0)
    assert [one["cpu-index"] for one in ring.execute("query-vcpu-dirty-limit")] == [1]
    ring.execute("set-vcpu-dirty-limit", dirty_rate=0)
    assert ring.execute("query-vcpu-dirty-limit") == []
    ring.execute("cancel-vcpu-dirty-limit")


@pytest.mark.parametrize("name", ["set-vcpu-dirty-limit", "cancel-vcpu-dirty-limit"])
@pytest.mark.parametrize("cpu", [2, -1])
def test_limit_of_a_vcpu_that_is_not_there_is_refused(ring: Served, name: str, cpu: int) -> None:
    rate = {"dirty_rate": 5} if name.startswith("set") else {}
    with pytest.raises(UsageError, match=f"there is no vCPU {cpu}"):
        ring.execute(name, cpu_index=cpu, **rate)
    assert ring.execute("query-vcpu-dirty-limit") == []


def test_machine_without_rings_limits_nobody_and_has_nothing_to_cancel(fake: Served) -> None:
    with pytest.raises(UsageError, match="does not know which vCPU writes"):
        fake.execute("set-vcpu-dirty-limit", dirty_rate=5)
    for rate in (-1, 1 << 32):
        with pytest.raises(QMPError):
            fake.execute("set-vcpu-dirty-limit", dirty_rate=rate)
    assert fake.execute("cancel-vcpu-dirty-limit") is None
    assert fake.execute("query-vcpu-dirty-limit") == []


def test_limits_are_the_migrations_while_it_sets_them(fake: Served, tmp_path: Path, stack: ExitStack) -> None:
    fake.machine.can_limit = True
    fake.controller.change_capabilities({Capability.DIRTY_LIMIT: True})
    listener = Listener(parse_address(f"unix:{tmp_path}/silent"))
    stack.callback(listener.close)
    fake.controller.migrate(f"unix:{tmp_path}/silent")
    for name, arguments in (("set-vcpu-dirty-limit", {"dirty_rate": 5}), ("cancel-vcpu-dirty-limit", {})):
        with pytest.raises(UsageError, match="the migration under way limits vCPUs") as caught:
            fake.execute(name, **arguments)
        assert caught.value.remedy
    fake.controller.cancel_migration()
    outgoing = fake.controller.outgoing
    assert outgoing is not None
    wait_until(lambda: outgoing.ended, "the migration ended")
    fake.execute("set-vcpu-dirty-limit", dirty_rate=5)
    assert fake.machine.limits[-1] == (5, 1.0)


@pytest.fixture
def qemu(kvm: KVM, tmp_path: Path, stack: ExitStack) -> QMPClient:
    require("qemu", QEMU, "there is no qemu-system-x86_64 here")
    path = tmp_path / "qemu"
    command = f"{QEMU} -accel kvm,dirty-ring-size=4096 -cpu qemu64 -m 16 -nodefaults -display none -S"
    process = subprocess.Popen([*command.split(), "-qmp", f"unix:{path},server=on,wait=off"], stderr=subprocess.DEVNULL)
    stack.callback(process.wait, BOUND)
    stack.callback(process.kill)
    clients: list[QMPClient] = []

    def connects() -> bool:
        assert process.poll() is None
        try:
            clients.append(QMPClient(path))
        except DirtylogError:
            return False
        return True

    wait_until(connects, "QEMU served QMP")
    stack.callback(clients[0].close)
    return clients[0]


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shape(part) for name, part in value.items()}
    return [_shape(part) for part in value[:1]] if isinstance(value, list) else type(value)


def test_answers_have_the_shape_of_qemu_s(ring: Served, qemu: QMPClient) -> None:
    def measured() -> bool:
        return bool(qemu.execute("query-dirty-rate")["status"] == "measured")

    steps: list[tuple[str, dict[str, object]]] = [
        ("query-dirty-rate", {}),
        ("calc-dirty-rate", {"calc_time": 1, "mode": "dirty-ring"}),
        ("query-dirty-rate", {}),
        ("set-vcpu-dirty-limit", {"dirty_rate": 5}),
        ("query-vcpu-dirty-limit", {}),
        ("set-vcpu-dirty-limit", {"dirty_rate": 0}),
        ("query-vcpu-dirty-limit", {}),
    ]
    for name, arguments in steps:
        theirs, ours = qemu.execute(name, **arguments), ring.execute(name, **arguments)
        if name == "calc-dirty-rate":
            wait_until(measured, "QEMU has measured")
            ring.measured()
        elif name == "query-dirty-rate":
            assert ours.pop("calc-time-unit") == "second"
            theirs.pop("calc-time-unit", None)  # since 8.2
            assert {name: ours[name] for name in ("status", "mode", "calc-time", "sample-pages")} == {
                name: theirs[name] for name in ("status", "mode", "calc-time", "sample-pages")
            }
        assert _shape(ours or None) == _shape(theirs or None), name


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("calc-dirty-rate", {"calc_time": 0}),
        ("calc-dirty-rate", {"calc_time": 1, "mode": "dirty-bitmap"}),
        ("calc-dirty-rate", {"calc_time": 1, "sample_pages": 5}),
        ("calc-dirty-rate", {"calc_time": 1, "mode": "nonsense"}),
        ("set-vcpu-dirty-limit", {"dirty_rate": 1, "cpu_index": 7}),
        ("set-vcpu-dirty-limit", {}),
        ("cancel-vcpu-dirty-limit", {"cpu_index": 7}),
    ],
)
def test_what_qemu_refuses_is_refused_with_its_class(
    ring: Served, qemu: QMPClient, name: str, arguments: dict[str, object]
) -> None:
    with pytest.raises(QMPCommandError) as theirs:
        qemu.execute(name, **arguments)
    with pytest.raises(DirtylogError) as ours:
        ring.execute(name, **arguments)
    assert theirs.value.error_class == "GenericError"
    assert not isinstance(ours.value, QMPError) or ours.value.error_class == "GenericError"
