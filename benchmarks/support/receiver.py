"""The receiving half of `bare`: fills memory from its standard input, a socket, over and over, and confirms each time.

A program of its own, which needs the standard library alone. Its argument is the size of the memory.
"""

import mmap
import socket
import sys
from typing import Final

_PIECE: Final = 1 << 20
_CONFIRMATION: Final = b"!"


def main() -> None:
    """Confirm that the memory is there, then each time that it was filled; until the sender ends the connection."""
    size = int(sys.argv[1])
    memory = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
    with socket.socket(fileno=sys.stdin.fileno()) as sock:
        filled = size
        while True:
            if filled == size:
                sock.sendall(_CONFIRMATION)
                filled = 0
            received = sock.recv_into(memory[filled : filled + _PIECE])
            if not received:
                return
            filled += received


if __name__ == "__main__":
    main()
