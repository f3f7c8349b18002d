"""The messages of QMP, the QEMU Machine Protocol, and their JSON.

The format is that of QEMU's published specification (docs/interop/qmp-spec): a greeting, requests with replies, and
events. Descriptions of errors are for people and worded here; programs go by the class.
"""

import json
import re
import time
from enum import StrEnum
from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct

from dirtylog.errors import DirtylogError, RefusedError

_MEMBERS: Final = frozenset({"execute", "arguments", "id"})
_TYPE_ERROR = re.compile(r"(?P<problem>.*?)(?: - at `\$\.?(?P<where>.*)`)?", re.DOTALL)


class ErrorClass(StrEnum):
    """The classes of errors that QMP knows; all but the first tell a program what to do."""

    GENERIC_ERROR = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"
    DEVICE_NOT_ACTIVE = "DeviceNotActive"
    DEVICE_NOT_FOUND = "DeviceNotFound"
    KVM_MISSING_CAP = "KVMMissingCap"


class QMPError(DirtylogError):
    """What a command's handler raises to answer with an error of a certain class.

    Attributes:
        error_class: the class.
        desc: the cause, for people.
    """

    def __init__(self, error_class: ErrorClass, desc: str) -> None:
        self.error_class = error_class
        self.desc = desc
        super().__init__(desc)


class QMPCommandError(RefusedError):
    """A QMP server answered a command with an error.

    Attributes:
        error_class: the class; servers may know others than ``ErrorClass``.
        desc: the cause, for people.
    """

    def __init__(self, error_class: str, desc: str) -> None:
        self.error_class = error_class
        self.desc = desc
        super().__init__(desc)


class VersionTriple(Struct, frozen=True):
    """A version number, in QEMU's words."""

    major: int
    minor: int
    micro: int


class Version(Struct, frozen=True):
    """Who serves: the member names are QEMU's, the numbers are the server's own."""

    qemu: VersionTriple
    package: str

    @classmethod
    def parse(cls, name: str, version: str) -> "Version":
        """From a program's name and version; what follows ``1.2.3`` is in ``package`` only."""
        numbers = [int(number) for number in re.findall(r"\d+", version)[:3]]
        return cls(VersionTriple(*numbers, *[0] * (3 - len(numbers))), f"{name} {version}")


class GreetingBody(Struct, frozen=True):
    """What the server is, and the optional parts of the protocol that it offers."""

    version: Version
    capabilities: list[str]


class Greeting(Struct, frozen=True):
    """The server's first message."""

    body: GreetingBody = msgspec.field(name="QMP")


class Request(Struct, frozen=True):
    """A client's request, without its ``id``."""

    execute: str
    arguments: dict[str, Any]


class Success(Struct, frozen=True):
    """The reply to a request that was carried out."""

    result: object = msgspec.field(name="return")
    id: object = UNSET


class ErrorBody(Struct, frozen=True):
    """Why a request was not carried out."""

    error_class: str = msgspec.field(name="class")
    desc: str


class Failure(Struct, frozen=True):
    """The reply to a request that was not carried out."""

    error: ErrorBody
    id: object = UNSET


class Timestamp(Struct, frozen=True):
    """When an event happened, on the server's real-time clock."""

    seconds: int
    microseconds: int

    @classmethod
    def now(cls) -> "Timestamp":
        """This moment."""
        microseconds = time.time_ns() // 1000
        return cls(*divmod(microseconds, 1_000_000))


class Event(Struct, frozen=True):
    """What the server tells unasked.

    Attributes:
        event: the name, in capitals.
        timestamp: when it happened.
        data: what is to be told, if anything.
    """

    event: str
    timestamp: Timestamp
    data: dict[str, Any] | msgspec.UnsetType = UNSET


def encode(message: Struct) -> bytes:
    """A message as one line of ASCII, as the specification wants what a server sends.

    Raises:
        TypeError, ValueError: something in the message has no JSON.
    """
    text = json.dumps(msgspec.to_builtins(message, str_keys=True), allow_nan=False)
    return text.encode("ascii") + b"\r\n"


def decode_object(data: bytes) -> dict[str, Any]:
    """The members of a JSON object.

    Raises:
        QMPError: the bytes are not JSON, or not an object.
    """
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise QMPError(ErrorClass.GENERIC_ERROR, f"invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise QMPError(ErrorClass.GENERIC_ERROR, "a request must be a JSON object")
    return value


def parse_request(members: dict[str, Any]) -> Request:
    """The request that an object means.

    Raises:
        QMPError: a member is missing, unknown or of the wrong type.
    """
    problem = None
    arguments = members.get("arguments", {})
    unknown = next((name for name in members if name not in _MEMBERS), None)
    if unknown is not None:
        problem = f"the request's member {unknown!r} is unexpected"
    elif "execute" not in members:
        problem = "the request lacks the member 'execute'"
    elif not isinstance(members["execute"], str):
        problem = "the request's member 'execute' must be a string"
    elif not isinstance(arguments, dict):
        problem = "the request's member 'arguments' must be an object"
    if problem is not None:
        raise QMPError(ErrorClass.GENERIC_ERROR, problem)
    return Request(members["execute"], arguments)


def describe_type_error(error: msgspec.ValidationError) -> str:
    """What msgspec found wrong with a value, as a phrase that starts with the path to it if there is one."""
    match = _TYPE_ERROR.fullmatch(str(error))
    if match is None or match["where"] is None:
        return str(error)
    problem = match["problem"].replace("`", "")
    return f"{match['where']!r}: {problem[:1].lower()}{problem[1:]}"
