import pytest

from dirtylog.control.settings import Capability, Settings
from dirtylog.errors import UsageError
from dirtylog.migration import Compression, Parameters
from dirtylog.units import MIB


def test_without_capabilities_there_is_one_channel_and_no_cache() -> None:
    assert Settings().effective == Parameters()
    assert (Settings().parameters.channels, Settings().parameters.delta_cache) == (2, 64 * MIB)


@pytest.mark.parametrize(
    ("capabilities", "channels", "delta_cache"),
    [
        ({Capability.MULTIFD}, 4, 0),
        ({Capability.XBZRLE}, 1, MIB),
        ({Capability.MULTIFD, Capability.XBZRLE, Capability.EVENTS}, 4, MIB),
        ({Capability.EVENTS}, 1, 0),
    ],
)
def test_capability_makes_its_parameter_count(capabilities: set[Capability], channels: int, delta_cache: int) -> None:
    settings = Settings(Parameters(channels=4, delta_cache=MIB, verify=True), frozenset(capabilities))
    assert settings.effective == Parameters(channels=channels, delta_cache=delta_cache, verify=True)


def test_parameters_change_and_the_rest_stays() -> None:
    settings = Settings(capabilities=frozenset({Capability.MULTIFD})).with_parameters(channels=3, max_bandwidth=5)
    assert settings.effective == Parameters(channels=3, max_bandwidth=5)
    with pytest.raises(UsageError, match="0 channels"):
        settings.with_parameters(channels=0)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"channels": 3}, "channels"),
        ({"clear_chunk": 1}, "clear chunk"),
        ({"compression": Compression.AUTO}, "compression"),
        ({"verify": True}, "verify"),
        ({"tls_creds": "elsewhere"}, "tls creds"),
        ({"tls_hostname": "other"}, "tls hostname"),
    ],
)
def test_change_of_what_was_agreed_on_is_refused(changes: dict[str, object], name: str) -> None:
    settings = Settings(capabilities=frozenset({Capability.MULTIFD}))
    with pytest.raises(UsageError, match=f"the {name} of a migration that is under way") as caught:
        settings.check_change(settings.with_parameters(**changes))
    assert caught.value.remedy


def test_change_of_what_does_not_count_or_may_change_is_accepted() -> None:
    settings = Settings()
    settings.check_change(settings.with_parameters(channels=3, delta_cache=MIB))
    settings.check_change(settings.with_parameters(max_bandwidth=1, downtime_limit=1.0, switchover_bandwidth=1))
