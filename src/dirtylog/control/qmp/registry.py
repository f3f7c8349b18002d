"""Which commands a QMP server knows, and the types of their arguments."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec
from msgspec import Struct

from dirtylog import __version__
from dirtylog.control.qmp.messages import ErrorClass, QMPError, Version, describe_type_error
from dirtylog.errors import UsageError

NEGOTIATE: Final = "qmp_capabilities"
"""The command that starts every session. It belongs to the session, and only its name is known here."""


class Arguments(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """The base of the types of commands' arguments: ``max_bandwidth`` here is ``max-bandwidth`` to clients."""


class NoArguments(Arguments, frozen=True):
    """The arguments of a command that takes none."""


A = TypeVar("A", bound=Struct)

Scope = ExitStack
"""What ends with a client's session. Handlers put there what must not outlast it; one object for each session."""


@dataclass(frozen=True, slots=True)
class Command(Generic[A]):
    """A command.

    Attributes:
        name: its name in requests.
        arguments: the type of its arguments.
        handler: what carries it out. What it returns becomes the reply: anything with JSON, None for nothing to say. It
            raises ``QMPError``, or another ``DirtylogError`` for one of class GenericError.
        after_reply: what to call once a successful reply was sent.
        scoped: whether the handler takes the session's ``Scope``, too.
    """

    name: str
    arguments: type[A]
    handler: Callable[..., object]
    after_reply: Callable[[], None] | None = None
    scoped: bool = False

    def run(self, arguments: A, scope: Scope) -> object:
        """Have the handler carry it out."""
        return self.handler(arguments, scope) if self.scoped else self.handler(arguments)

    def parse(self, arguments: dict[str, Any]) -> A:
        """The typed arguments.

        Raises:
            QMPError: an argument is unknown, missing or of the wrong type.
        """
        fields = msgspec.structs.fields(self.arguments)
        known = {field.encode_name for field in fields}
        for name in arguments:
            if name not in known:
                raise QMPError(ErrorClass.GENERIC_ERROR, f"parameter {name!r} is unexpected")
        for field in fields:
            if field.required and field.encode_name not in arguments:
                raise QMPError(ErrorClass.GENERIC_ERROR, f"parameter {field.encode_name!r} is missing")
        try:
            return msgspec.convert(arguments, self.arguments)
        except msgspec.ValidationError as error:
            desc = f"invalid parameter {describe_type_error(error)}"
            raise QMPError(ErrorClass.GENERIC_ERROR, desc) from error


class CommandInfo(Struct, frozen=True):
    """What query-commands tells of a command."""

    name: str


class CommandRegistry:
    """The commands of one server: those that are added, query-commands and query-version.

    Args:
        version: what query-version and the greeting tell; this package's own unless given.
    """

    def __init__(self, version: Version | None = None) -> None:
        self.version: Final = version or Version.parse("dirtylog", __version__)
        self._commands: dict[str, Command[Any]] = {}
        self.add("query-commands", NoArguments, self._query_commands)
        self.add("query-version", NoArguments, lambda _: self.version)

    def add(
        self,
        name: str,
        arguments: type[A],
        handler: Callable[[A], object],
        *,
        after_reply: Callable[[], None] | None = None,
    ) -> None:
        """Add a command; see ``Command``."""
        self._add(Command(name, arguments, handler, after_reply))

    def add_scoped(self, name: str, arguments: type[A], handler: Callable[[A, Scope], object]) -> None:
        """Add a command whose handler leaves something behind that ends with the session."""
        self._add(Command(name, arguments, handler, scoped=True))

    def _add(self, command: Command[Any]) -> None:
        if command.name == NEGOTIATE or command.name in self._commands:
            raise UsageError(f"there is a QMP command {command.name!r} already")
        self._commands[command.name] = command

    def find(self, name: str) -> Command[Any]:
        """The command of that name.

        Raises:
            QMPError: there is none.
        """
        try:
            return self._commands[name]
        except KeyError:
            raise QMPError(ErrorClass.COMMAND_NOT_FOUND, f"there is no command {name!r}") from None

    def _query_commands(self, _: NoArguments) -> list[CommandInfo]:
        return [CommandInfo(name) for name in sorted([NEGOTIATE, *self._commands])]
