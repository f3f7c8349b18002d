from collections.abc import Iterator
from typing import Any

import pytest
from support.running import Emulated, MakeEmulated


@pytest.fixture
def run() -> Iterator[MakeEmulated]:
    """Makes machines; closes them."""
    made: list[Emulated] = []

    def make(*args: Any, **options: Any) -> Emulated:
        made.append(Emulated(*args, **options))
        return made[-1]

    yield make
    for running in made:
        running.close()
