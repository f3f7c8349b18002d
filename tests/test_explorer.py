"""The explorer of models finds what there is to find; what it is for is in `migration/test_custody.py`."""

from collections.abc import Iterator

import pytest
from support.explorer import CounterexampleError, cannot_reach, explore


def _jugs(state: tuple[int, int]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Two jugs, of three litres and of five."""
    small, large = state
    yield "fill small", (3, large)
    yield "fill large", (small, 5)
    yield "empty small", (0, large)
    yield "empty large", (small, 0)
    poured = min(small, 5 - large)
    yield "pour small into large", (small - poured, large + poured)
    poured = min(large, 3 - small)
    yield "pour large into small", (small + poured, large - poured)


def _countdown(state: int) -> Iterator[tuple[str, int]]:
    if state > 0:
        yield "down", state - 1
    if state == 0:
        yield "stay", 0
    if state == 5:
        yield "stop", -1


def test_all_states_are_found_and_no_others() -> None:
    reachable = {(small, large) for small in range(4) for large in range(6) if small in (0, 3) or large in (0, 5)}
    assert set(explore([(0, 0)], _jugs, {})) == reachable


def test_counterexample_is_the_shortest_and_can_be_read() -> None:
    with pytest.raises(CounterexampleError) as caught:
        explore([(0, 0)], _jugs, {"never four": lambda state: 4 not in state})
    assert caught.value.broken == "never four"
    assert caught.value.state == (3, 4)
    assert caught.value.trace == (
        "fill large",
        "pour large into small",
        "empty small",
        "pour large into small",
        "fill large",
        "pour large into small",
    )
    assert str(caught.value).splitlines()[0] == "never four: broken after 6 steps"
    assert str(caught.value).splitlines()[1:3] == ["  1. fill large", "  2. pour large into small"]


def test_first_state_may_break_an_invariant() -> None:
    with pytest.raises(CounterexampleError, match="never dry: broken after 0 steps"):
        explore([(0, 0)], _jugs, {"never dry": any})


def test_states_that_no_way_leads_on_from_are_told() -> None:
    states = explore([7], _countdown, {})
    assert cannot_reach(states, _countdown, lambda state: state == -1) == {0, 1, 2, 3, 4}
