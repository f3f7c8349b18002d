import msgspec
import pytest

from dirtylog.cli.verdict import verdict_text
from dirtylog.control.migration_info import MigrationInfo, RAMInfo, VerdictInfo

_NEVER = VerdictInfo(
    converges=False, seconds=None, downtime=None, needed_limit=None, needed_bandwidth=None, needed_throttle=0.0
)
_RAM = RAMInfo(*[0] * 14)


def text(verdict: VerdictInfo | None, throttle: int | None = None) -> str:
    return verdict_text(
        MigrationInfo(
            status="active",
            total_time=0,
            setup_time=0,
            ram=_RAM,
            x_passes=[],
            x_verdict=verdict,
            cpu_throttle_percentage=throttle,
        )
    )


def test_nothing_is_said_before_two_passes_tell() -> None:
    for verdict in (None, msgspec.structs.replace(_NEVER, converges=None)):
        assert text(verdict) == "it is too early to tell whether it converges"


@pytest.mark.parametrize(
    ("seconds", "downtime", "expected"),
    [
        (0.0, 0.0125, "it converges now, with a downtime of 12.5 ms"),
        (0.0, None, "it converges now"),
        (3.25, 0.25, "it will converge in 3.25 s, with a downtime of 250.0 ms"),
    ],
)
def test_migration_that_converges_is_told_when_and_at_what_downtime(
    seconds: float, downtime: float | None, expected: str
) -> None:
    assert text(msgspec.structs.replace(_NEVER, converges=True, seconds=seconds, downtime=downtime)) == expected


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ({}, ""),
        ({"needed_limit": 1.5}, ": it takes a downtime limit of 1.50 s"),
        ({"needed_throttle": 60.4}, ": it takes a throttle of more than 60 %"),
        (
            {"needed_limit": 1.5, "needed_bandwidth": 1024.0},
            ": it takes a downtime limit of 1.50 s or a bandwidth of 1.0 KiB/s",
        ),
        (
            {"needed_limit": 1.5, "needed_bandwidth": 1024.0, "needed_throttle": 60.4},
            ": it takes a downtime limit of 1.50 s, a bandwidth of 1.0 KiB/s or a throttle of more than 60 %",
        ),
    ],
)
def test_migration_that_never_converges_is_told_what_would_help(needs: dict[str, float], expected: str) -> None:
    verdict = msgspec.structs.replace(_NEVER, **needs)
    assert text(verdict) == f"it will never converge as it is{expected}"
    assert text(verdict, 30) == f"it does not converge at a throttle of 30 %{expected}"


def test_throttle_that_it_has_already_is_no_help() -> None:
    verdict = msgspec.structs.replace(_NEVER, needed_throttle=60.4)
    assert text(verdict, 60) == "it does not converge at a throttle of 60 %"
