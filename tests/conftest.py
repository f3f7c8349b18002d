import os
from collections.abc import Iterator

import pytest
from hypothesis import settings
from support.require import require

from dirtylog.errors import HostError
from dirtylog.linux.kvm import KVM

# The same examples in every run, and no time limits: hosts are shared. DIRTYLOG_EXPLORE=1 looks for new ones.
settings.register_profile("dirtylog", deadline=None, derandomize=not os.environ.get("DIRTYLOG_EXPLORE"))
settings.load_profile("dirtylog")


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
