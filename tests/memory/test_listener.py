import inspect

import pytest
from support.listeners import Recorder

from dirtylog.memory import MemoryListener
from dirtylog.memory.listener import offers

CALLBACKS = [name for name, member in inspect.getmembers(MemoryListener, inspect.isfunction) if name[0] != "_"]


@pytest.mark.parametrize("callback", CALLBACKS)
def test_bare_listener_offers_nothing(callback: str) -> None:
    assert not offers(MemoryListener(), callback)


def test_listener_offers_what_it_or_its_parents_override() -> None:
    class Child(Recorder):
        pass

    offered = {callback for callback in CALLBACKS if offers(Child([]), callback)}
    assert {"log_sync", "log_clear", "region_add"} <= offered
    assert "log_sync_global" not in offered
