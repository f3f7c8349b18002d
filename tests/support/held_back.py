"""Postcopy in which nothing is sent in order, so that the guest has to ask for what it needs."""

from collections.abc import Callable
from typing import Final

import pytest

from dirtylog.migration.batch import Batch
from dirtylog.migration.owed import OwedPages

_GLANCE: Final = 0.002
_NOTHING: Final = Batch(None, (), None)


def hold_back(patch: pytest.MonkeyPatch, until: Callable[[float], bool]) -> None:
    """Have sources send nothing in order until ``until``, which waits for so many seconds at most, is true."""
    take = OwedPages.take

    def held(owed: OwedPages) -> Batch | None:
        return take(owed) if until(_GLANCE) else _NOTHING

    patch.setattr(OwedPages, "take", held)
