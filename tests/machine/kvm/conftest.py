from collections.abc import Iterator
from typing import Any

import pytest
from support.running import MakeRunning, Running

from dirtylog.linux.kvm import KVM


@pytest.fixture
def run(kvm: KVM) -> Iterator[MakeRunning]:
    """Makes machines; closes them."""
    made: list[Running] = []

    def make(*args: Any, **options: Any) -> Running:
        made.append(Running(*args, **options))
        return made[-1]

    yield make
    for running in made:
        running.close()
