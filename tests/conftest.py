from collections.abc import Iterator

import pytest
from support.require import require

from dirtylog.errors import HostError
from dirtylog.linux.kvm import KVM


@pytest.fixture
def kvm() -> Iterator[KVM]:
    """An open /dev/kvm; a test that asks for it is skipped where there is none, or fails under DIRTYLOG_REQUIRE=kvm."""
    try:
        handle = KVM()
    except HostError as error:
        require("kvm", False, str(error))
        raise
    with handle:
        yield handle
