from contextlib import nullcontext

import pytest

from dirtylog.memory import Client
from dirtylog.trackers import ClearingTrackerListener, SplitTrackerListener
from dirtylog.trackers.own_memory import TRACKERS, own_memory_listener
from dirtylog.trackers.watch import TRACKERS as WATCH_TRACKERS


def test_mechanisms_are_those_of_watch() -> None:
    assert list(TRACKERS) == list(WATCH_TRACKERS)


@pytest.mark.parametrize("name", TRACKERS)
def test_listener_clears_as_its_mechanism_does(name: str) -> None:  # D5
    kind = ClearingTrackerListener if name == "soft-dirty" else SplitTrackerListener
    assert type(own_memory_listener(name, nullcontext, clients=~Client.CODE)) is kind
