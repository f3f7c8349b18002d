"""The urgent channel once both sides are on it: requests one way, pages the other.

What travels there are messages like all others, but a guest waits for each. Step by step, as `Channel` sends and
receives them, they took a tenth of the time that it waits. Here a message is sent in one step, and all that arrived
together are received in one. What has not arrived whole is left for later, and holds nobody up.
"""

import mmap
from collections.abc import Iterator
from typing import Final

from dirtylog.errors import ProtocolError
from dirtylog.linux.mapping import BufferMapping
from dirtylog.migration.channel import Channel
from dirtylog.migration.messages import HEAD, PAGE_FRAME, OnePage, Page, Request, ZeroPage, decode_head
from dirtylog.migration.protocol import Role
from dirtylog.units import KIB, PAGE_SIZE

_BUFFER_SIZE: Final = 16 * KIB
"""Three pages with their frames; more than one only come together when several vCPUs wait."""
_BODY: Final = PAGE_FRAME.size - HEAD.size
_REST_OF_HEAD: Final = (0, _BODY)
_EXPECTED: Final[dict[Role, dict[int, int]]] = {
    Role.SOURCE: {Request.TYPE: 0},
    Role.DESTINATION: {Page.TYPE: PAGE_SIZE, ZeroPage.TYPE: 0},
}
"""What each side may be told, and how many bytes follow the frame."""


class UrgentChannel:
    """Requests and pages, over a channel that both sides have agreed on as the urgent one. One thread uses it.

    Args:
        channel: on which nothing else is said from here on; closed by its owner.
        role: which side this is.
    """

    def __init__(self, channel: Channel, role: Role) -> None:
        self._channel = channel
        self._expected = _EXPECTED[role]
        self._what = "requests" if role is Role.SOURCE else "pages"
        buffer = BufferMapping(memoryview(mmap.mmap(-1, _BUFFER_SIZE)))
        self._address = buffer.address
        self._memory = buffer.memory
        self._filled = 0

    def send(self, kind: type[OnePage], block: int, page: int, contents: memoryview | None = None) -> int:
        """Send a message, and the page's contents if they belong to it; how many bytes that were."""
        frame = memoryview(PAGE_FRAME.pack(kind.TYPE, 0, _BODY, block, page))
        return self._channel.send_frame([frame] if contents is None else [frame, contents])

    def receive(self) -> Iterator[tuple[int, int, int]]:
        """What has arrived: number of the block, number of the page, and the address of its contents.

        The address is 0 where there are none, and good until the next message is asked for. Does not wait.

        Raises:
            ProtocolError: the peer said something else.
        """
        more = True
        while more:
            self._filled += self._channel.receive_available(self._memory[self._filled :])
            done = 0
            while self._filled - done >= PAGE_FRAME.size:
                number, reserved, length, block, page = PAGE_FRAME.unpack_from(self._memory, done)
                payload = self._expected.get(number)
                if payload is None or (reserved, length) != _REST_OF_HEAD:
                    raise self._unexpected(done)
                end = done + PAGE_FRAME.size + payload
                if end > self._filled:
                    break
                yield block, page, self._address + done + PAGE_FRAME.size if payload else 0
                done = end
            self._keep(done)
            more = self._channel.has_buffered

    def _keep(self, done: int) -> None:
        """Have the rest at the beginning. It may be shorter than a frame because it is another that nobody expects."""
        rest = self._filled - done
        if rest and done:
            self._memory[:rest] = self._memory[done : self._filled]
        if HEAD.size <= rest < PAGE_FRAME.size:
            number, *others = HEAD.unpack_from(self._memory)
            if number not in self._expected or tuple(others) != _REST_OF_HEAD:
                raise self._unexpected(0)
        self._filled = rest

    def _unexpected(self, start: int) -> ProtocolError:
        kind, length = decode_head(self._memory[start : start + HEAD.size].tobytes())
        if kind.TYPE in self._expected:
            return ProtocolError(f"the stream is corrupt: a {kind.__name__} message of {length} bytes")
        return ProtocolError(f"the {self._channel.peer} sent {kind.__name__} where only {self._what} are expected")
