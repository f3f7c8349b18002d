"""Every tracker of this package passes the published suite."""

from functools import cache
from typing import ClassVar, NoReturn

import pytest
from support.require import require

from dirtylog.errors import HostError
from dirtylog.testing import Case, TrackerSuite, Writing
from dirtylog.testing.mechanisms import MECHANISMS, Mechanism


@cache
def failure_of(name: str) -> HostError | None:
    return MECHANISMS[name].failure()


class MechanismSuite(TrackerSuite):
    """The suite for a row of `MECHANISMS`. Its writers are all that there are, those included that it is blind to."""

    mechanism: ClassVar[Mechanism]
    rounds = 100

    def __init_subclass__(cls, *, name: str) -> None:
        cls.mechanism = MECHANISMS[name]
        cls.differences = cls.mechanism.differences
        cls.writers = cls.mechanism.writers

    def make(self, pages: int) -> Case:
        return self.mechanism.make(pages)

    def lacking(self, what: str, error: HostError) -> NoReturn:
        name = what if what in (writing.value for writing in Writing) else self.mechanism.needs
        require(name, False, str(error))
        raise error

    @pytest.fixture(autouse=True)
    def _on_this_host(self) -> None:
        failure = failure_of(self.mechanism.name)
        require(self.mechanism.needs, failure is None, str(failure))


class TestWriteWatch(MechanismSuite, name="write-watch"):
    pass


class TestWriteWatchPrivate(MechanismSuite, name="write-watch-private"):
    pass


class TestWriteWatchInitiallySet(MechanismSuite, name="write-watch-initially-set"):
    pass


class TestSoftDirty(MechanismSuite, name="soft-dirty"):
    pass


class TestComparison(MechanismSuite, name="comparison"):
    pass


class TestHashes(MechanismSuite, name="hashes"):
    pass


class TestNull(MechanismSuite, name="null"):
    pass


class TestKVMLegacy(MechanismSuite, name="kvm-legacy"):
    pass


class TestKVMManual(MechanismSuite, name="kvm-manual"):
    pass


class TestKVMInitiallySet(MechanismSuite, name="kvm-initially-set"):
    pass


class TestKVMRing(MechanismSuite, name="kvm-ring"):
    pass


class TestKVMRingSmallest(MechanismSuite, name="kvm-ring-smallest"):
    pass


def test_every_mechanism_has_a_test_class() -> None:
    assert {suite.mechanism.name for suite in MechanismSuite.__subclasses__()} == MECHANISMS.keys()
