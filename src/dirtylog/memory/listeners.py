"""Telling listeners, in order, whatever one of them does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dirtylog.errors import UsageError
from dirtylog.memory.address_space import AddressSpace
from dirtylog.memory.listener import MemoryListener, offers

_EVENTFD_CALLBACKS = ("eventfd_add", "eventfd_del")


class Listeners:
    """The listeners of one memory, by ascending priority; equal ones in the order in which they came.

    What a callback raises does not keep the others from hearing: it is kept until the telling is over, and raised then,
    once. While something is told, the model must not be changed.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[MemoryListener, AddressSpace]] = []
        self._telling = 0
        self._errors: list[Exception] = []

    def __contains__(self, listener: MemoryListener) -> bool:
        return any(known is listener for known, _ in self._entries)

    def add(self, listener: MemoryListener, space: AddressSpace) -> None:
        """Add a listener at the place of its priority."""
        place = (n for n, (known, _) in enumerate(self._entries) if known.priority > listener.priority)
        self._entries.insert(next(place, len(self._entries)), (listener, space))

    def remove(self, listener: MemoryListener) -> None:
        """Take a listener out."""
        self._entries = [entry for entry in self._entries if entry[0] is not listener]

    def space_of(self, listener: MemoryListener) -> AddressSpace | None:
        """The address space that a listener follows, or None if it is not known."""
        return next((space for known, space in self._entries if known is listener), None)

    def forward(self, space: AddressSpace | None = None) -> list[MemoryListener]:
        """Those that follow an address space, or all, by ascending priority."""
        return [listener for listener, followed in self._entries if space is None or followed is space]

    def offering(self, *callbacks: str) -> list[tuple[MemoryListener, AddressSpace]]:
        """Those that override one of some callbacks, with what they follow."""
        return [entry for entry in self._entries if any(offers(entry[0], callback) for callback in callbacks)]

    def want_eventfds(self, space: AddressSpace) -> bool:
        """Whether any listener of an address space cares for eventfds."""
        return any(offers(listener, name) for listener in self.forward(space) for name in _EVENTFD_CALLBACKS)

    def check_may_change(self) -> None:
        """Refuse a change of the model from inside a callback.

        Raises:
            UsageError: something is being told.
        """
        if self._telling:
            raise UsageError(
                "memory cannot be changed from inside a listener's callback",
                remedy="note what is wanted, and change it when the call that led to the callback has returned",
            )

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Raise what the callbacks called in this block raised, at its end and only once."""
        self._telling += 1
        try:
            yield
        except BaseException as error:
            if self._telling == 1:
                _note_others(error, self._take_errors())
            raise
        finally:
            self._telling -= 1
        if not self._telling and self._errors:
            first, *others = self._take_errors()
            _note_others(first, others)
            raise first

    @property
    def failed(self) -> bool:
        """Whether a callback of the current telling raised."""
        return bool(self._errors)

    def _take_errors(self) -> list[Exception]:
        errors, self._errors = self._errors, []
        return errors

    def tell(self, listener: MemoryListener, callback: Callable[..., None], *args: object) -> None:
        """Call one callback."""
        try:
            callback(*args)
        except Exception as error:  # noqa: BLE001 - kept for the end of the telling, so that the others hear too
            error.add_note(f"raised by {type(listener).__name__}.{callback.__name__}, a memory listener's callback")
            self._errors.append(error)


def _note_others(error: BaseException, others: list[Exception]) -> None:
    if others:
        error.add_note(f"{len(others)} more callbacks of memory listeners failed at the same time")
