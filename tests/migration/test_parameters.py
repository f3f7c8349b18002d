from dataclasses import fields

import pytest

from dirtylog.errors import UsageError
from dirtylog.migration import Parameters
from dirtylog.migration.convergence import ThrottleParameters
from dirtylog.migration.parameters import Compression, Slowdown


def test_defaults_are_those_of_the_command_line() -> None:
    assert Parameters() == Parameters(
        downtime_limit=0.3,
        max_bandwidth=0,
        switchover_bandwidth=0,
        clear_chunk=128 << 20,
        verify=False,
        share_memory=False,
        channels=1,
        compression=Compression.NONE,
        delta_cache=0,
        slowdown=Slowdown.NONE,
        throttle=ThrottleParameters(trigger=50, initial=20, increment=10, maximum=99, tailslow=False),
        vcpu_dirty_limit=1,
        dirty_limit_period=1.0,
    )


def test_what_is_agreed_on_at_the_beginning_is_what_the_destination_or_the_caches_depend_on() -> None:
    names = {field.name for field in fields(Parameters)}
    changeable = {"downtime_limit", "max_bandwidth", "max_postcopy_bandwidth", "switchover_bandwidth"}
    slowing = {"throttle", "vcpu_dirty_limit", "dirty_limit_period"}
    switching = {"postcopy_after", "pause_before_switchover"}
    assert names - Parameters.AGREED == changeable | slowing | switching
    assert names >= Parameters.AGREED


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("downtime_limit", 0),
        ("downtime_limit", 2000),
        ("max_bandwidth", 0),
        ("max_bandwidth", (1 << 63) - 1),
        ("switchover_bandwidth", 0),
        ("switchover_bandwidth", (1 << 63) - 1),
        ("channels", 1),
        ("channels", 64),
        ("delta_cache", 0),
        ("delta_cache", 4096),
        ("delta_cache", (1 << 63) - 1),
        ("clear_chunk", 1),
        ("clear_chunk", (1 << 63) - 1),
        ("postcopy_after", 0),
        ("postcopy_after", (1 << 31) - 1),
        ("vcpu_dirty_limit", 1),
        ("vcpu_dirty_limit", (1 << 32) - 1),
        ("dirty_limit_period", 0.001),
        ("dirty_limit_period", 1),
    ],
)
def test_value_at_a_bound_is_accepted(name: str, value: int) -> None:
    assert getattr(Parameters(**{name: value}), name) == value  # type: ignore[arg-type]  # none of them is verify


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("downtime_limit", -0.001, "a downtime limit of -0.001 s"),
        ("downtime_limit", 2000.001, "a downtime limit of 2000.001 s"),
        ("downtime_limit", float("nan"), "a downtime limit of nan s"),
        ("max_bandwidth", -1, "a bandwidth of -1 bytes a second"),
        ("max_bandwidth", 1 << 63, "a bandwidth of 9223372036854775808 bytes a second"),
        ("switchover_bandwidth", -1, "a bandwidth of -1 bytes a second"),
        ("switchover_bandwidth", 1 << 63, "a bandwidth of 9223372036854775808 bytes a second"),
        ("channels", 0, "0 channels"),
        ("channels", 65, "65 channels"),
        ("delta_cache", -1, "a cache of -1 bytes"),
        ("delta_cache", 4095, "a cache of 4095 bytes"),
        ("delta_cache", 1 << 63, "a cache of 9223372036854775808 bytes"),
        ("clear_chunk", 0, "a clear chunk of 0 bytes"),
        ("clear_chunk", 1 << 63, "a clear chunk of 9223372036854775808 bytes"),
        ("postcopy_after", -1, "postcopy after -1 passes"),
        ("postcopy_after", 1 << 31, "postcopy after 2147483648 passes"),
        ("vcpu_dirty_limit", 0, "a dirty limit of 0 MiB/s"),
        ("vcpu_dirty_limit", 1 << 32, "a dirty limit of 4294967296 MiB/s"),
        ("dirty_limit_period", 0.0, "a period of 0.0 s for the dirty limit"),
        ("dirty_limit_period", 1.001, "a period of 1.001 s for the dirty limit"),
    ],
)
def test_value_out_of_range_is_refused(name: str, value: float, cause: str) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        Parameters(**{name: value})  # type: ignore[arg-type]  # none of them is verify
    assert caught.value.remedy
