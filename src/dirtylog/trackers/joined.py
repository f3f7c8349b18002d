"""Several trackers, one after the other, as one."""

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from dirtylog.errors import UsageError
from dirtylog.memory import Words
from dirtylog.trackers.tracker import Tracker
from dirtylog.units import WORD_BITS, word_count

T = TypeVar("T", bound=Tracker)


class JoinedTracker(Generic[T]):
    """For a range that its mechanism cannot track in one piece.

    Attributes:
        parts: in ascending order, each but the last of whole 64-page words, so that no word is shared.
    """

    def __init__(self, parts: Sequence[T]) -> None:
        if not parts or any(part.pages % WORD_BITS for part in parts[:-1]):
            raise UsageError("trackers that are joined must have whole 64-page words, but for the last")
        self.parts = tuple(parts)

    @property
    def pages(self) -> int:
        """The sum of the parts."""
        return sum(part.pages for part in self.parts)

    def arm(self) -> None:
        """Arm all parts, or none if one cannot be."""
        armed: list[T] = []
        try:
            for part in self.parts:
                part.arm()
                armed.append(part)
        except BaseException:
            for part in armed:
                part.disarm()
            raise

    def collect(self, words: Words) -> None:
        """Collect each part into its own words."""
        for start, part in self._places():
            part.collect(words[start // WORD_BITS :][: word_count(part.pages)])

    def clear(self, first: int, count: int, words: Words) -> None:
        """Clear what is named in each part."""
        for start, part in self._places():
            low, high = max(first, start), min(first + count, start + part.pages)
            if low < high:
                named = words[(low - first) // WORD_BITS :][: word_count(high - low)]
                if named.any():
                    part.clear(low - start, high - low, named)

    def disarm(self) -> None:
        """Disarm all parts."""
        for part in self.parts:
            part.disarm()

    def _places(self) -> Iterator[tuple[int, T]]:
        start = 0
        for part in self.parts:
            yield start, part
            start += part.pages
