import numpy as np
import pytest

from dirtylog.trackers import TrackedRange
from dirtylog.trackers.null import NullTracker


@pytest.mark.parametrize("pages", [1, 63, 64, 65, 1000])
def test_everything_is_reported_always(pages: int) -> None:
    tracked = TrackedRange(NullTracker(pages))
    tracked.arm()
    for _ in range(2):
        assert tracked.collect().count() == pages
        tracked.clear(0, pages)
    tracked.disarm()


def test_clear_needs_nothing() -> None:
    tracker = NullTracker(64)
    tracker.clear(0, 64, np.zeros(1, np.uint64))
    assert tracker.pages == 64
