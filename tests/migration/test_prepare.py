from collections.abc import Iterator, Sequence
from mmap import mmap

import numpy as np
import numpy.typing as npt
import pytest

from dirtylog.errors import HostError, KernelError
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.memory import RAMBlock
from dirtylog.migration import prepare as prepare_module
from dirtylog.migration.prepare import Preparer
from dirtylog.units import GIB, HUGE_PAGE_SIZE, PAGE_SIZE

_SIZE = 3 * HUGE_PAGE_SIZE + 5 * PAGE_SIZE


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RAMBlock]]:
    monkeypatch.setattr(prepare_module, "available_memory", lambda: GIB)
    blocks = [RAMBlock("ram", _SIZE), RAMBlock("rom", 2 * PAGE_SIZE)]
    yield blocks
    for block in blocks:
        block.close()


def _flags(blocks: Sequence[RAMBlock]) -> list[npt.NDArray[np.bool_]]:
    return [np.zeros(-(-block.size // HUGE_PAGE_SIZE), np.bool_) for block in blocks]


def _run(blocks: list[RAMBlock]) -> None:
    preparer = Preparer(blocks, _flags(blocks))
    preparer.start()
    preparer.join()


def _stored(block: RAMBlock) -> int:
    return sum(end - start for start, end in block.mapping.extents(0, block.size))


@pytest.mark.parametrize("huge", [False, True])
def test_memory_is_there_afterwards_and_holds_what_it_held(
    blocks: list[RAMBlock], monkeypatch: pytest.MonkeyPatch, huge: bool
) -> None:
    if not huge:
        monkeypatch.setattr(MemfdMapping, "make_huge", lambda *_: False)
    blocks[0].array[HUGE_PAGE_SIZE + 5] = 7
    _run(blocks)
    assert [_stored(block) for block in blocks] == [_SIZE, 2 * PAGE_SIZE]
    assert blocks[0].array[HUGE_PAGE_SIZE + 5] == 7
    assert blocks[0].array.sum() == 7


def test_at_most_half_of_what_is_free_is_taken(blocks: list[RAMBlock], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "available_memory", lambda: 5 * HUGE_PAGE_SIZE)
    _run(blocks)
    assert [_stored(block) for block in blocks] == [2 * HUGE_PAGE_SIZE, 0]


def test_what_is_ready_is_flagged(blocks: list[RAMBlock], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "available_memory", lambda: 5 * HUGE_PAGE_SIZE)
    ready = _flags(blocks)
    preparer = Preparer(blocks, ready)
    preparer.start()
    preparer.join()
    assert [flags.tolist() for flags in ready] == [[True, True, False, False], [False]]


def test_it_ends_when_it_is_told_to(blocks: list[RAMBlock], monkeypatch: pytest.MonkeyPatch) -> None:
    preparer = Preparer(blocks, _flags(blocks))
    made: list[int] = []

    def stop(_: MemfdMapping, start: int) -> bool:
        made.append(start)
        preparer.stop()
        preparer.stop()
        return True

    monkeypatch.setattr(MemfdMapping, "make_huge", stop)
    preparer.start()
    preparer.join()
    assert made == [0]


@pytest.mark.parametrize(
    ("where", "name", "error"),
    [
        (prepare_module, "available_memory", HostError("nobody tells")),
        (MemfdMapping, "populate", KernelError("madvise", 22, "Invalid argument")),
    ],
    ids=["nobody-tells", "no-such-call"],
)
def test_host_that_does_not_let_it_costs_nothing(
    blocks: list[RAMBlock], monkeypatch: pytest.MonkeyPatch, where: object, name: str, error: Exception
) -> None:
    def refuse(*_: object) -> int:
        raise error

    monkeypatch.setattr(where, name, refuse)
    monkeypatch.setattr(MemfdMapping, "make_huge", lambda *_: False)
    _run(blocks)  # an exception in its thread would fail this test
    assert [_stored(block) for block in blocks] == [0, 0]


def test_what_arrives_meanwhile_stays(blocks: list[RAMBlock]) -> None:
    preparer = Preparer(blocks, _flags(blocks))
    preparer.start()
    blocks[0].array[::PAGE_SIZE] = 9
    preparer.join()
    assert set(blocks[0].array[::PAGE_SIZE].tolist()) == {9}


def test_memory_of_the_caller_keeps_its_contents(blocks: list[RAMBlock]) -> None:
    block = RAMBlock("own", 4 * PAGE_SIZE, memoryview(mmap(-1, 4 * PAGE_SIZE)))
    block.array[5] = 7
    _run([block])
    assert (block.array[5], block.array.sum()) == (7, 7)
    block.close()


def test_one_that_was_not_started_can_be_joined(blocks: list[RAMBlock]) -> None:
    preparer = Preparer(blocks, _flags(blocks))
    preparer.stop()
    preparer.join()
    assert [_stored(block) for block in blocks] == [0, 0]
