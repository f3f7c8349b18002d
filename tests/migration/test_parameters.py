from dataclasses import fields

import pytest

from dirtylog.errors import UsageError
from dirtylog.migration import Parameters
from dirtylog.migration.parameters import Compression


def test_defaults_are_those_of_the_command_line() -> None:
    assert Parameters() == Parameters(
        downtime_limit=0.3,
        max_bandwidth=0,
        switchover_bandwidth=0,
        clear_chunk=128 << 20,
        verify=False,
        channels=1,
        compression=Compression.NONE,
        delta_cache=0,
    )


def test_what_is_agreed_on_at_the_beginning_is_what_the_destination_or_the_caches_depend_on() -> None:
    names = {field.name for field in fields(Parameters)}
    assert names - Parameters.AGREED == {"downtime_limit", "max_bandwidth", "switchover_bandwidth"}
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
    ],
)
def test_value_out_of_range_is_refused(name: str, value: float, cause: str) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        Parameters(**{name: value})  # type: ignore[arg-type]  # none of them is verify
    assert caught.value.remedy
