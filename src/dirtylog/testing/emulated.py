"""A guest in Unicorn that does nothing but write stamps, to memory of this process."""

from typing import Final

from unicorn import Uc, UcError
from unicorn import unicorn_const as unicorn
from unicorn import x86_const as x86

from dirtylog.errors import ClosedError, GuestError, HostError
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.testing.board import Board
from dirtylog.testing.programs import BOARD, CODE, MEMORY, STAMP, assembled, stamp_registers
from dirtylog.testing.writers import Writers, WriterThreads
from dirtylog.units import MIB, PAGE_SIZE

_CODE_BUFFER: Final = 32 * MIB
"""For Unicorn's translations; it would reserve a GiB."""
_NO_END: Final = 0xFFFF_FFFF


class UnicornGuest:
    """One emulated processor, which stores to this process's memory.

    Args:
        address: where the memory is in this process.
        pages: how many.

    Raises:
        HostError: Unicorn does not work here.
    """

    def __init__(self, address: int, pages: int) -> None:
        self._code = MemfdMapping("dirtylog-guest", PAGE_SIZE)
        self._board: Board | None = None
        try:
            self._uc: Uc | None = Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
            self._uc.ctl_set_tcg_buffer_size(_CODE_BUFFER)
            self._uc.mem_map_ptr(MEMORY, pages * PAGE_SIZE, unicorn.UC_PROT_ALL, address)
            self._uc.mem_map_ptr(CODE, PAGE_SIZE, unicorn.UC_PROT_ALL, self._code.address)
        except UcError as error:
            self.close()
            raise HostError(f"Unicorn cannot run a guest: {error}") from error

    def stamp(self, board: Board, place: int, seed: int) -> Writers:
        """Have the processor begin to stamp pages; to be called once.

        Args:
            board: what it follows.
            place: the index of its stamp among a page's 32-bit words.
            seed: chooses pages.
        """
        self._board = board  # which stays mapped as long as the guest may write it
        uc = self._open()
        uc.mem_map_ptr(BOARD, PAGE_SIZE, unicorn.UC_PROT_ALL, board.mapping.address)
        uc.mem_write(CODE, assembled(STAMP))
        for name, value in (stamp_registers(0, place, seed) | {"eip": CODE}).items():
            uc.reg_write(getattr(x86, f"UC_X86_REG_{name.upper()}"), value)
        return WriterThreads(board, 1, self._run, self.close)

    def _run(self, _: int) -> None:
        uc = self._open()
        try:
            uc.emu_start(uc.reg_read(x86.UC_X86_REG_EIP), _NO_END)
        except UcError as error:
            raise GuestError(f"Unicorn cannot go on: {error}") from error

    def close(self) -> None:
        """Give the processor up; idempotent."""
        self._uc = self._board = None
        self._code.close()

    def _open(self) -> Uc:
        if self._uc is None:
            raise ClosedError("this guest was closed")
        return self._uc
