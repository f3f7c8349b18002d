from itertools import pairwise

import pytest

from dirtylog.errors import HostError, UsageError
from dirtylog.machine.unicorn import tracking
from dirtylog.machine.unicorn.tracking import choose_tracker
from dirtylog.trackers import own_memory


def _refuse(*_: object) -> object:
    raise HostError("not here")


def test_the_best_that_the_host_has_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(tracking.TRACKERS)
    for better, next_best in pairwise(names):
        monkeypatch.setitem(own_memory.TRACKERS, better, _refuse)
        if next_best == "soft-dirty":
            monkeypatch.setitem(own_memory.TRACKERS, next_best, own_memory.TRACKERS["null"])
        assert choose_tracker(None) == next_best


def test_what_the_host_lacks_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(own_memory.TRACKERS, "write-watch", _refuse)
    with pytest.raises(HostError, match="not here"):
        choose_tracker("write-watch")


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="choose from write-watch, soft-dirty, comparison, null"):
        choose_tracker("magic")
