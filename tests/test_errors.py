import inspect

import pytest

from dirtylog import errors
from dirtylog.errors import DirtylogError, KernelError

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, DirtylogError)]


def test_every_class_is_drawn_in_the_tree() -> None:
    tree = (errors.__doc__ or "").split()
    assert [cls.__name__ for cls in ALL if cls.__name__ not in tree] == []


def test_drawn_tree_has_the_right_parents() -> None:
    """A child stands deeper than its parent, below it, with nothing as shallow as the parent between them."""
    depths: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        name = next((word for word in line.split() if hasattr(errors, word)), None)
        if name is None:
            continue
        depth = line.index(name)
        while depths and depths[-1][0] >= depth:
            depths.pop()
        parent = getattr(errors, depths[-1][1]) if depths else Exception
        assert getattr(errors, name).__bases__ == (parent,)
        depths.append((depth, name))


def test_message_is_the_cause_and_the_remedy() -> None:
    error = DirtylogError("there is no /dev/kvm", remedy="load its module")
    assert (error.cause, error.remedy) == ("there is no /dev/kvm", "load its module")
    assert str(error) == "there is no /dev/kvm; load its module"


def test_message_without_a_remedy_is_the_cause() -> None:
    error = DirtylogError("the guest halted")
    assert error.remedy is None
    assert str(error) == "the guest halted"


def test_kernel_error_carries_call_and_errno() -> None:
    error = KernelError("KVM_RUN", 14, "Bad address", remedy="report it")
    assert (error.call, error.errno) == ("KVM_RUN", 14)
    assert str(error) == "KVM_RUN failed: Bad address; report it"


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_class_says_who_is_to_blame(cls: type[DirtylogError]) -> None:
    assert cls.__doc__
