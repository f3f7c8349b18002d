"""One client of a QMP server: its socket, its thread, and what waits to be sent to it.

Everything sent goes through one queue, so a client sees replies and events in the order in which they were made.
Whoever sends tries the socket at once without waiting; what it does not take is sent by the client's thread when it
can. Events come from threads that must never wait, so a client that lets too many pile up is dropped. Replies cannot
pile up, because the next request is not carried out before the last reply is gone.
"""

import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from dirtylog.control.qmp.session import Answer, HandlerError, Session
from dirtylog.errors import DirtylogError
from dirtylog.linux.wakeup import Waiter, Wakeup

MAX_BACKLOG: Final = 1 << 20
"""The most bytes that may wait to be sent when an event comes, besides a reply; some thousands of events."""

_RECEIVE_SIZE: Final = 1 << 16
_LAST_REPLY_SECONDS: Final = 2.0


class Connection:
    """Serves one client until it leaves, ``stop`` or ``drop``.

    Args:
        client: the client's socket, owned from here on.
        session: the protocol.
        command_lock: held while a command runs, so that one runs at a time whichever client it comes from.
        on_failure: called with each defect.
        on_end: called when all is over.
    """

    def __init__(
        self,
        client: socket.socket,
        session: Session,
        command_lock: threading.Lock,
        *,
        on_failure: Callable[[DirtylogError], None],
        on_end: Callable[["Connection"], None],
    ) -> None:
        client.setblocking(False)
        self._socket: Final = client
        self._session: Final = session
        self._command_lock: Final = command_lock
        self._on_failure: Final = on_failure
        self._on_end: Final = on_end
        self._lock: Final = threading.Lock()
        self._backlog = bytearray()
        self._reply_size = 0
        self._subscribed = False
        self._gone = False
        self._closed = False
        self._stopping = False
        self._wakeup: Final = Wakeup()
        self._waiter: Final = Waiter(client.fileno(), self._wakeup)
        self._thread: Final = threading.Thread(target=self._run, name="qmp-client", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests; what is under way is still answered."""
        self._stopping = True
        self._wake()

    def drop(self) -> None:
        """Hang up at once."""
        with self._lock:
            self._gone = True
            if not self._closed:
                self._socket.shutdown(socket.SHUT_RDWR)
        self._wake()

    def join(self, timeout: float) -> bool:
        """Wait until the thread has ended; false if it has not. A thread does not wait for itself."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def emit(self, event: bytes) -> None:
        """Send an event if the client is negotiated. Never waits: a client that does not read is dropped."""
        with self._lock:
            wanted = self._subscribed and not self._gone
            fits = len(self._backlog) + len(event) <= MAX_BACKLOG + self._reply_size
            if wanted and fits:
                self._backlog += event
                self._flush()
        if wanted and not fits:
            self.drop()
        elif wanted and self._backlog:
            self._wake()

    def _run(self) -> None:
        try:
            self._send(self._session.greeting())
            while data := self._receive():
                self._session.feed(data)
                if not self._answer_all():
                    break
        except DirtylogError as error:
            self._on_failure(error)
        finally:
            self._close()
            self._end_session()
            self._on_end(self)

    def _end_session(self) -> None:
        try:
            with self._command_lock:
                self._session.close()
        except DirtylogError as error:
            self._on_failure(error)

    def _close(self) -> None:
        with self._lock:
            self._gone = self._closed = True
            self._socket.close()
            self._wakeup.close()

    def _receive(self) -> bytes:
        """What the client sent next; nothing once it is gone or the server stops."""
        while not self._stopping and not self._gone:
            self._wait(read=True)
            try:
                return self._socket.recv(_RECEIVE_SIZE)
            except BlockingIOError:
                continue
            except ConnectionError:
                break
        return b""

    def _answer_all(self) -> bool:
        """Answer every whole request that is here; false when the connection must end."""
        while True:
            with self._command_lock:
                answer = None if self._stopping else self._session.next_answer()
            if answer is None:
                return True
            self._deliver(answer)
            if answer.last or self._gone:
                return False

    def _deliver(self, answer: Answer) -> None:
        self._send(answer.reply)
        if answer.failure is not None:
            self._on_failure(answer.failure)
        final = answer.last or answer.after_reply is not None
        self._drain(_LAST_REPLY_SECONDS if final else None)
        self._reply_size = 0
        if answer.after_reply is not None:
            _call(answer.after_reply)

    def _send(self, message: bytes) -> None:
        with self._lock:
            self._backlog += message
            self._reply_size = len(message)
            self._flush()
            self._subscribed = self._session.negotiated  # no event before the reply that ends the negotiation

    def _drain(self, timeout: float | None) -> None:
        """Wait until all is sent, the client is gone, or time is up."""
        end = None if timeout is None else time.monotonic() + timeout
        while self._backlog and not self._gone:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return
            self._wait(timeout=left)

    def _wait(self, *, read: bool = False, timeout: float | None = None) -> None:
        self._waiter.wait(read=read, write=bool(self._backlog), timeout=timeout)
        self._wakeup.clear()
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        """Send what the socket takes without waiting; called with the lock held."""
        while self._backlog and not self._gone:
            try:
                del self._backlog[: self._socket.send(self._backlog)]
            except BlockingIOError:
                return
            except ConnectionError:
                self._gone = True

    def _wake(self) -> None:
        with self._lock:
            if not self._closed:
                self._wakeup.set()


def _call(after_reply: Callable[[], None]) -> None:
    try:
        after_reply()
    except DirtylogError:
        raise
    except Exception as error:
        raise HandlerError("after_reply", error) from error
