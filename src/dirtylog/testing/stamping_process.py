"""A process that stamps pages; run as a script, since it has nothing to import. `writers.WriterProcesses` starts it."""

import mmap
import os
import random
import sys
from typing import Final

_PAGE_SIZE: Final = 4096
_STORES: Final = 64
_LAST_COUNT: Final = (1 << 18) - 1  # `board.LAST_COUNT`


def main(
    memory_fd: int,
    board_fd: int,
    pages: int,
    place: int,
    seed: int,
    owner: int,
    least_word: int,
    still_word: int,
    first_word: int,
    span_word: int,
    stamped_word: int,
    standing_word: int,
) -> None:
    """Stamp pages until the pipe on standard input is closed, or its owner has gone.

    Args:
        memory_fd: the memory's descriptor.
        board_fd: the board's.
        pages: how many.
        place: the index of the stamp among a page's 32-bit words.
        seed: chooses pages.
        owner: the process that asked for this.
        least_word: an index in the board, as the others; see `board`.
        still_word: told to stand still.
        first_word: the first of the pages to write.
        span_word: how many.
        stamped_word: tells what was stamped.
        standing_word: tells that this stands still.
    """
    memory = memoryview(mmap.mmap(memory_fd, pages * _PAGE_SIZE)).cast("I")
    board = memoryview(mmap.mmap(board_fd, _PAGE_SIZE)).cast("I")
    choice = random.Random(seed)  # noqa: S311 - the same in every run
    stamp = 0
    while os.getppid() == owner:
        if board[still_word]:
            board[standing_word] = 1
            if not os.read(0, 1):
                return
            board[standing_word] = 0
            continue
        first, span = board[first_word], board[span_word]
        stamp = max(stamp, board[least_word])
        for _ in range(_STORES):
            stamp += stamp & _LAST_COUNT != _LAST_COUNT
            page = (first + int(choice.random() * span)) % pages
            memory[page * (_PAGE_SIZE // 4) + place] = stamp
        board[stamped_word] = stamp


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
