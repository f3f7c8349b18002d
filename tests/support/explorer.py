"""An explorer of models: every state that can be reached, and the shortest way to one that must not be."""

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import TypeVar

S = TypeVar("S", bound=Hashable)

Steps = Callable[[S], Iterable[tuple[str, S]]]
"""What can happen in a state: what to call it, and the state that it leads to."""


class CounterexampleError(AssertionError):
    """A state that breaks an invariant can be reached.

    Attributes:
        broken: the invariant's name.
        trace: what happens until then; there is no shorter way.
        state: where that ends.
    """

    def __init__(self, broken: str, trace: tuple[str, ...], state: object) -> None:
        self.broken = broken
        self.trace = trace
        self.state = state
        steps = "".join(f"\n{number:3}. {label}" for number, label in enumerate(trace, 1))
        super().__init__(f"{broken}: broken after {len(trace)} steps{steps}\n  => {state}")


def explore(initial: Iterable[S], steps: Steps[S], invariants: Mapping[str, Callable[[S], bool]]) -> Collection[S]:
    """All states that can be reached, breadth first.

    Raises:
        CounterexampleError: one of them breaks an invariant.
    """
    came_from: dict[S, tuple[S, str] | None] = {}
    waiting: deque[S] = deque()

    def reach(state: S, origin: tuple[S, str] | None) -> None:
        if state in came_from:
            return
        came_from[state] = origin
        for name, holds in invariants.items():
            if not holds(state):
                raise CounterexampleError(name, _trace(came_from, state), state)
        waiting.append(state)

    for state in initial:
        reach(state, None)
    while waiting:
        state = waiting.popleft()
        for label, following in steps(state):
            reach(following, (state, label))
    return came_from.keys()


def _trace(came_from: Mapping[S, tuple[S, str] | None], state: S) -> tuple[str, ...]:
    labels = []
    while (origin := came_from[state]) is not None:
        state, label = origin
        labels.append(label)
    return tuple(reversed(labels))


def cannot_reach(states: Iterable[S], steps: Steps[S], goal: Callable[[S], bool]) -> set[S]:
    """Those of some states from which no way leads to one that is a goal. Steps must not lead out of them."""
    left = set(states)
    origins: dict[S, list[S]] = {state: [] for state in left}
    for state in left:
        for _, following in steps(state):
            origins[following].append(state)
    waiting = [state for state in left if goal(state)]
    left.difference_update(waiting)
    while waiting:
        for origin in origins[waiting.pop()]:
            if origin in left:
                left.remove(origin)
                waiting.append(origin)
    return left
