"""Where connections to a destination come in: who is let in is decided by what each says first.

Anybody may connect, any number at once. A connection has a thread of its own until it is let in or turned away: making
a channel of it may need a handshake, which blocks, and so does reading. There are never more than `MAX_VISITORS`.
The clock is kept outside of them, by the thread that accepts: it shuts a connection down whose time is up, whatever
that one's thread is waiting for, so that bytes that trickle in gain nobody any time.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Final, Self, TypeVar

from dirtylog.errors import CancelledError, DirtylogError, DisconnectedError, HostError, ProtocolError, UsageError
from dirtylog.linux.sockets import peer_name
from dirtylog.linux.wakeup import Waiter, Wakeup
from dirtylog.migration.channel import HANDSHAKE_TIMEOUT, Channel
from dirtylog.migration.listener import Listener
from dirtylog.migration.messages import Message
from dirtylog.migration.refusals import Refusals

MAX_VISITORS: Final = 32
"""The most connections that are kept at once before they are let in; the one that came first gives way to the next."""
GRACE: Final = 0.5
"""Seconds that none has to give way in: a source says at once what it wants. The next ones wait in the queue."""

Judge = Callable[[Channel, Message], None]
"""Told what a connection says first, one at a time. Raises a `DirtylogError` if it is not to be let in."""

_M = TypeVar("_M", bound=Message)


class _Visitor:
    """A connection that was not let in yet.

    Attributes:
        socket: the connection, its thread's to use and close.
        name: who is at its other end.
        came: when, by the monotonic clock.
        dismissal: why it has to go, if it has to.
        leaving: whether it was told why.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.name = peer_name(sock)
        self.came = time.monotonic()
        self.dismissal: DirtylogError | None = None
        self.leaving = False
        # A second descriptor: it shuts the connection down whatever is being made of the first, or after its close.
        self._handle = sock.dup()

    def dismiss(self, reason: DirtylogError, *, at_once: bool = False) -> None:
        """Have its thread wait for nothing any more; what it has to be told can still be sent, unless at once."""
        if self.dismissal is None:
            self.dismissal = reason
        with contextlib.suppress(OSError):  # the peer was quicker
            self._handle.shutdown(socket.SHUT_RDWR if at_once or self.leaving else socket.SHUT_RD)

    def close(self) -> None:
        """Close what is not the thread's."""
        self._handle.close()


class Reception:
    """Lets connections in, in threads of its own, until it is closed.

    Args:
        listener: where they come in; owned here from now on.
        judge: decides about each. What one is told that is turned away, and the log, is the error that it raises.
    """

    def __init__(self, listener: Listener, judge: Judge) -> None:
        self._listener = listener
        self._judge = judge
        self._changed = threading.Condition()
        self._visitors: dict[_Visitor, threading.Thread] = {}
        self._finished: list[threading.Thread] = []
        self._admitted: list[tuple[Channel, Message]] = []
        self._arrival = Wakeup()
        self._aborted = self._closing = self._closed = False
        self._defect: Exception | None = None
        self._refusals = Refusals()
        self._thread = threading.Thread(target=self._run, name="reception", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def take(
        self, kind: type[_M], timeout: float | None = None, *, unless: Channel | None = None
    ) -> tuple[Channel, _M]:
        """Wait for a connection that is let in and began with a kind of message, for some seconds or for ever.

        Args:
            kind: of message.
            timeout: seconds.
            unless: a channel that ends the wait when its peer says something, or is gone.

        Returns:
            The channel, the caller's from now on, and the message.

        Raises:
            CancelledError: `abort` was called.
            DisconnectedError: none came in time, or who is at ``unless`` has gone.
            PeerError: who is at ``unless`` says something, see `Channel.check_quiet`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        watched = self._arrival if unless is None else unless
        waiter = Waiter(watched.fileno(), self._arrival)
        while True:
            if (found := self._find(kind)) is not None:
                found[0].enlarge_buffers()
                return found
            if unless is not None:
                unless.check_quiet()
            if not waiter.wait(read=True, timeout=None if deadline is None else deadline - time.monotonic()):
                raise DisconnectedError(f"no {kind.__name__} came within {timeout:.0f} s")

    def abort(self) -> None:
        """Make `take` give up, in whichever thread it waits; nothing to do after `close`."""
        with self._changed:
            if self._closing:
                return
            self._aborted = True
            self._listener.abort()
            for visitor in self._visitors:
                visitor.dismiss(_cancelled(), at_once=True)
            for channel, _ in self._admitted:
                channel.abort()
            self._arrival.set()
            self._changed.notify_all()

    def close(self) -> None:
        """Listen no more, turn away who was not let in, and end all threads; idempotent. Not while one is in `take`."""
        with self._changed:
            if self._closed:
                return
            self._closing = True
            self._listener.abort()
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            for visitor in self._visitors:
                visitor.dismiss(UsageError("the destination has its source, and waits for nobody else"))
            threads = [*self._visitors.values(), *self._finished]
        for thread in threads:
            thread.join()
        self._closed = True
        for channel, _ in self._admitted:
            channel.close()
        self._listener.close()
        self._arrival.close()
        self._refusals.close()

    def _find(self, kind: type[_M]) -> tuple[Channel, _M] | None:
        with self._changed:
            self._arrival.clear()
            if self._defect is not None:
                raise self._defect
            if self._aborted:
                raise _cancelled()
            for index, (channel, message) in enumerate(self._admitted):
                if isinstance(message, kind):
                    del self._admitted[index]
                    return channel, message
        return None

    def _run(self) -> None:
        try:
            self._accept_all()
        except CancelledError:  # the listener was told to give up, from here or from elsewhere
            self.abort()
        except Exception as error:  # noqa: BLE001 - raised by `take`
            with self._changed:
                self._defect = error
                self._arrival.set()

    def _accept_all(self) -> None:
        while True:
            self._join_finished()
            try:
                sock = self._listener.accept(self._dismiss_late())
            except HostError as error:  # nothing is left to take anybody in with, until others have gone
                self._refusals.add("cannot let anybody in", str(error))
                self._dismiss_first(error)
                continue
            if sock is not None:
                self._make_room()
                self._let_in(sock)

    def _dismiss_late(self) -> float | None:
        """Dismiss those whose time is up; seconds until the next one's is."""
        with self._changed:
            for visitor in self._visitors:  # in the order in which they came
                if visitor.dismissal is None:
                    left = visitor.came + HANDSHAKE_TIMEOUT - time.monotonic()
                    if left > 0:
                        return left
                    visitor.dismiss(ProtocolError(f"it did not say within {HANDSHAKE_TIMEOUT:.0f} s what it wants"))
        return None

    def _make_room(self) -> None:
        """Wait until there is a place for one more."""
        with self._changed:
            while len(self._visitors) >= MAX_VISITORS and not self._over:
                self._dismiss_first(HostError(f"it did not say what it wants, and {MAX_VISITORS} others wait"))

    def _dismiss_first(self, reason: DirtylogError) -> None:
        """Dismiss who came first, unless that is a moment ago, and wait for a change."""
        with self._changed:
            first = next(iter(self._visitors), None)
            if first is not None and first.came + GRACE <= time.monotonic():
                first.dismiss(reason)
            if not self._over:
                self._changed.wait(GRACE)

    def _let_in(self, sock: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            try:
                visitor = _Visitor(sock)
                stack.callback(visitor.close)
                thread = threading.Thread(target=self._serve, args=(visitor,), name="visitor", daemon=True)
                with self._changed:
                    if self._over:
                        return
                    thread.start()
                    self._visitors[visitor] = thread
            except (OSError, RuntimeError) as error:  # no descriptor, or no thread
                self._refusals.add(f"refused a connection from {peer_name(sock)}", str(error))
                return
            stack.pop_all()

    def _serve(self, visitor: _Visitor) -> None:
        channel: Channel | None = None
        try:
            channel = self._listener.open(visitor.socket)
            self._admit(visitor, channel, channel.receive())
        except Exception as error:  # noqa: BLE001 - logged; whatever one connection brings about, others may come
            try:
                self._turn_away(visitor, channel, error)
            finally:
                self._forget(visitor)

    def _admit(self, visitor: _Visitor, channel: Channel, message: Message) -> None:
        with self._changed:
            if visitor.dismissal is not None:
                raise visitor.dismissal
            self._judge(channel, message)
            self._forget(visitor)  # from here on nobody may dismiss it
            self._admitted.append((channel, message))
            self._arrival.set()

    def _turn_away(self, visitor: _Visitor, channel: Channel | None, error: Exception) -> None:
        with self._changed:
            visitor.leaving = True
            dismissal = visitor.dismissal
        defect = None if isinstance(error, DirtylogError) else error
        reason = dismissal or (DirtylogError(f"a defect in dirtylog: {error!r}") if defect else error)
        if not isinstance(reason, CancelledError):
            self._refusals.add(f"refused a connection from {visitor.name}", str(reason), defect)
        if channel is not None:
            with channel:
                channel.give_up(reason, wait=dismissal is None)

    def _forget(self, visitor: _Visitor) -> None:
        with self._changed:
            self._finished.append(self._visitors.pop(visitor))
            visitor.close()
            self._changed.notify_all()

    def _join_finished(self) -> None:
        with self._changed:
            finished, self._finished = self._finished, []
        for thread in finished:
            thread.join()

    @property
    def _over(self) -> bool:
        return self._closing or self._aborted


def _cancelled() -> CancelledError:
    return CancelledError("waiting for a migration was cancelled")
