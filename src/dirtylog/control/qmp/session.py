"""One client's session, as bytes in and answers out; does no I/O."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from msgspec import UNSET, field

from dirtylog.control.qmp.messages import (
    ErrorBody,
    ErrorClass,
    Failure,
    Greeting,
    GreetingBody,
    QMPError,
    Request,
    Success,
    decode_object,
    encode,
    parse_request,
)
from dirtylog.control.qmp.registry import NEGOTIATE, Arguments, Command, CommandRegistry, Scope
from dirtylog.control.qmp.stream import JSONStream, OversizeError
from dirtylog.errors import DirtylogError, ProtocolError

MAX_REQUEST: Final = 1 << 20
"""The most bytes of one request."""


class HandlerError(DirtylogError):
    """A command's handler failed in a way it was not meant to: a defect, chained as the cause."""

    def __init__(self, command: str, error: Exception) -> None:
        super().__init__(f"internal error: command {command!r}: {type(error).__name__}: {error}")


class NegotiationArguments(Arguments, frozen=True):
    """The arguments of qmp_capabilities."""

    enable: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Answer:
    """What is to be done about a request.

    Attributes:
        reply: what to send.
        after_reply: what to call once it was sent.
        failure: a defect that the owner of the server must hear of.
        last: the connection must be closed.
    """

    reply: bytes
    after_reply: Callable[[], None] | None = None
    failure: HandlerError | None = None
    last: bool = False


class Session:
    """The server's side of one connection: requests in, answers out, one at a time.

    Attributes:
        negotiated: the client has ended the negotiation; from then on it is sent events.
    """

    def __init__(self, registry: CommandRegistry) -> None:
        self._registry = registry
        self._stream = JSONStream(MAX_REQUEST)
        self._negotiation = Command(NEGOTIATE, NegotiationArguments, self._negotiate)
        self._scope = Scope()
        self.negotiated = False

    def greeting(self) -> bytes:
        """What to send first."""
        return encode(Greeting(GreetingBody(self._registry.version, [])))

    def feed(self, data: bytes) -> None:
        """Add bytes that came from the client."""
        self._stream.feed(data)

    def close(self) -> None:
        """End what commands left behind for the session's time; idempotent.

        Raises:
            DirtylogError: something did not end as it should.
        """
        try:
            self._scope.close()
        except DirtylogError:
            raise
        except Exception as error:
            raise HandlerError("end of the session", error) from error

    def next_answer(self) -> Answer | None:
        """Carry out the next whole request; None when there is none."""
        try:
            message = self._stream.next()
        except ProtocolError as error:
            return Answer(_failure(error, UNSET), last=isinstance(error, OversizeError))
        return None if message is None else self._answer(message)

    def _answer(self, message: bytes) -> Answer:
        identity: object = UNSET
        try:
            members = decode_object(message)
            identity = members.get("id", UNSET)
            request = parse_request(members)
            command = self._find(request)
            arguments = command.parse(request.arguments)
            return Answer(self._execute(command, arguments, identity), command.after_reply)
        except HandlerError as error:
            return Answer(_failure(error, identity), failure=error)
        except DirtylogError as error:
            return Answer(_failure(error, identity))

    def _find(self, request: Request) -> Command[Any]:
        if request.execute == NEGOTIATE:
            if self.negotiated:
                raise QMPError(ErrorClass.COMMAND_NOT_FOUND, "the session is negotiated already")
            return self._negotiation
        if not self.negotiated:
            desc = f"the session must be negotiated first: execute {NEGOTIATE!r}"
            raise QMPError(ErrorClass.COMMAND_NOT_FOUND, desc)
        return self._registry.find(request.execute)

    def _negotiate(self, arguments: NegotiationArguments) -> None:
        for capability in arguments.enable:
            raise QMPError(ErrorClass.GENERIC_ERROR, f"the capability {capability!r} is not offered")
        self.negotiated = True

    def _execute(self, command: Command[Any], arguments: Any, identity: object) -> bytes:
        try:
            result = command.run(arguments, self._scope)
            return encode(Success({} if result is None else result, identity))
        except DirtylogError:
            raise
        except Exception as error:
            raise HandlerError(command.name, error) from error


def _failure(error: DirtylogError, identity: object) -> bytes:
    error_class = error.error_class if isinstance(error, QMPError) else ErrorClass.GENERIC_ERROR
    return encode(Failure(ErrorBody(error_class, str(error)), identity))
