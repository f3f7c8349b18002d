import mmap

import pytest

from dirtylog.errors import ClosedError
from dirtylog.memory import RAMBlock
from dirtylog.units import PAGE_SIZE


def test_words_and_bytes_are_the_same_memory() -> None:
    block = RAMBlock("ram", 3 * PAGE_SIZE)
    block.array[2 * PAGE_SIZE + 8] = 7

    block.memory[:2] = b"ab"

    assert block.array[:2].tobytes() == b"ab"
    assert block.pages == 3
    assert block.page_words.shape == (3, 512)
    assert block.page_words[2, 1] == 7
    block.close()


def test_pages_that_were_written_are_stored() -> None:
    block = RAMBlock("ram", 8 * PAGE_SIZE)
    assert block.stored == 0
    block.array[3 * PAGE_SIZE] = 1
    block.array[7 * PAGE_SIZE - 1 :] = 0  # pages 6 and 7, with zeros
    assert block.stored == 3
    block.mapping.punch(7 * PAGE_SIZE, PAGE_SIZE)
    assert block.stored == 2
    block.close()


def test_all_pages_of_a_callers_buffer_are_stored() -> None:
    block = RAMBlock("ram", 2 * PAGE_SIZE, memoryview(mmap.mmap(-1, 2 * PAGE_SIZE)))
    assert block.stored == 2
    block.close()


def test_block_can_be_closed_twice_and_not_used_afterwards() -> None:
    block = RAMBlock("ram", PAGE_SIZE)
    block.close()
    block.close()

    with pytest.raises(ClosedError):
        _ = block.array
    with pytest.raises(ClosedError):
        _ = block.memory
