from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from dirtylog.control.qmp.messages import ErrorClass, QMPError
from dirtylog.control.qmp.registry import Arguments, CommandRegistry, NoArguments, Scope
from dirtylog.control.qmp.session import MAX_REQUEST, Answer, HandlerError, Session
from dirtylog.errors import UsageError


class Text(Arguments, frozen=True):
    the_text: str


def fail(error: Exception) -> None:
    raise error


@pytest.fixture
def registry() -> CommandRegistry:
    registry = CommandRegistry()
    registry.add("echo", Text, lambda arguments: arguments.the_text)
    registry.add("nothing", NoArguments, lambda _: None, after_reply=lambda: None)
    registry.add("missing", NoArguments, lambda _: fail(QMPError(ErrorClass.DEVICE_NOT_FOUND, "gone")))
    registry.add("misused", NoArguments, lambda _: fail(UsageError("no", remedy="do it so")), after_reply=lambda: None)
    registry.add("broken", NoArguments, lambda _: fail(KeyError("k")))
    registry.add("no-json", NoArguments, lambda _: object())
    registry.add("not-a-number", NoArguments, lambda _: float("nan"))
    return registry


@pytest.fixture
def session(registry: CommandRegistry) -> Session:
    return Session(registry)


@pytest.fixture
def negotiated(session: Session) -> Session:
    assert answers(session, b'{"execute": "qmp_capabilities"}') == [{"return": {}}]
    return session


def raw_answers(session: Session, data: bytes) -> list[Answer]:
    session.feed(data)
    return list(iter(session.next_answer, None))


def answers(session: Session, data: bytes) -> list[Any]:
    """The replies, their errors without the words for people."""
    replies = [msgspec.json.decode(answer.reply) for answer in raw_answers(session, data)]
    for reply in replies:
        if "error" in reply:
            assert reply["error"].pop("desc")
    return replies


def error(name: str, **members: object) -> dict[str, object]:
    return {"error": {"class": name}, **members}


def test_greeting_tells_version_and_no_capabilities(session: Session, registry: CommandRegistry) -> None:
    greeting = msgspec.json.decode(session.greeting())
    assert greeting["QMP"] == {"version": msgspec.to_builtins(registry.version), "capabilities": []}


@pytest.mark.parametrize("command", ["echo", "query-version", "nope"])
def test_command_before_negotiation_is_not_found(session: Session, command: str) -> None:
    data = msgspec.json.encode({"execute": command, "id": 1})
    assert answers(session, data) == [error("CommandNotFound", id=1)]
    assert not session.negotiated


def test_second_negotiation_is_not_found(negotiated: Session) -> None:
    assert answers(negotiated, b'{"execute": "qmp_capabilities"}') == [error("CommandNotFound")]
    assert answers(negotiated, b'{"execute": "qmp_capabilities", "arguments": 1}') == [error("GenericError")]
    assert negotiated.negotiated


def test_capability_that_is_not_offered_is_refused(session: Session) -> None:
    data = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}'
    assert answers(session, data) == [error("GenericError")]
    assert not session.negotiated
    assert answers(session, b'{"execute": "qmp_capabilities", "arguments": {"enable": []}}') == [{"return": {}}]


REQUESTS: dict[bytes, list[dict[str, object]]] = {
    b'{"execute": "nothing"}': [{"return": {}}],
    b'{"execute": "nothing", "arguments": {}}': [{"return": {}}],
    b'{"execute": "nothing", "id": null}': [{"return": {}, "id": None}],
    b'{"execute": "nothing", "id": {"a": [1, "\\u00e9"]}}': [{"return": {}, "id": {"a": [1, "é"]}}],
    '{"execute": "echo", "arguments": {"the-text": "é😀"}}'.encode(): [{"return": "é😀"}],
    b'{"execute": "nothing", "id": 1}{"execute": "nothing", "id": 2}': [
        {"return": {}, "id": 1},
        {"return": {}, "id": 2},
    ],
    b'{"execute": "nope", "id": 1}': [error("CommandNotFound", id=1)],
    b'{"execute": "missing", "id": 1}': [error("DeviceNotFound", id=1)],
    b'{"execute": "misused", "id": 1}': [error("GenericError", id=1)],
    b'{"execute": "nothing", "arguments": {"x": 1}, "id": 1}': [error("GenericError", id=1)],
    b'{"execute": "echo", "id": 1}': [error("GenericError", id=1)],
    b'{"execute": "echo", "arguments": {"the-text": 1}, "id": 1}': [error("GenericError", id=1)],
    b'{"execute": 1, "id": 1}': [error("GenericError", id=1)],
    b'{"execute": "nothing", "x": 1, "id": 1}': [error("GenericError", id=1)],
    b'{"id": 1}': [error("GenericError", id=1)],
    b"{}": [error("GenericError")],
    b'[{"execute": "nothing"}]': [error("GenericError")],
    b"null\n": [error("GenericError")],
    b'{"execute": "nothing", "id": NaN}': [error("GenericError")],
    b'{"execute": "nothing",}': [error("GenericError")],
    b'junk {"execute": "nothing"}\n': [error("GenericError")],
    b'{"execute": "nothing"\n\xff\n': [error("GenericError")],
}


@pytest.mark.parametrize(("data", "expected"), REQUESTS.items(), ids=map(repr, REQUESTS))
class TestRequests:
    def test_whole(self, negotiated: Session, data: bytes, expected: list[object]) -> None:
        assert answers(negotiated, data) == expected

    def test_byte_by_byte(self, negotiated: Session, data: bytes, expected: list[object]) -> None:
        assert [reply for byte in data for reply in answers(negotiated, bytes([byte]))] == expected

    def test_with_trailing_data(self, negotiated: Session, data: bytes, expected: list[object]) -> None:
        trailing = b'{"execute": "nothing", "id": "last"}'
        assert answers(negotiated, data + trailing) == [*expected, {"return": {}, "id": "last"}]


def test_error_of_the_library_is_told_with_its_remedy(negotiated: Session) -> None:
    [answer] = raw_answers(negotiated, b'{"execute": "misused"}')
    assert msgspec.json.decode(answer.reply)["error"]["desc"] == "no; do it so"
    assert answer.failure is None


@pytest.mark.parametrize(
    ("command", "cause", "desc"),
    [
        ("broken", KeyError, "internal error: command 'broken': KeyError: 'k'"),
        ("no-json", TypeError, "internal error: command 'no-json': TypeError: "),
        ("not-a-number", ValueError, "internal error: command 'not-a-number': ValueError: "),
    ],
)
def test_defect_in_a_handler_is_told_to_client_and_owner(
    negotiated: Session, command: str, cause: type[Exception], desc: str
) -> None:
    [answer] = raw_answers(negotiated, msgspec.json.encode({"execute": command, "id": 7}))
    reply = msgspec.json.decode(answer.reply)
    assert reply["id"] == 7
    assert reply["error"]["class"] == "GenericError"
    assert reply["error"]["desc"].startswith(desc)
    assert answer.failure is not None
    assert isinstance(answer.failure.__cause__, cause)


def test_after_reply_belongs_to_success_only(negotiated: Session) -> None:
    [done, refused] = raw_answers(negotiated, b'{"execute": "nothing"}{"execute": "misused"}')
    assert done.after_reply is not None
    assert refused.after_reply is None


def test_request_that_is_too_long_is_the_last(negotiated: Session) -> None:
    [answer] = raw_answers(negotiated, b'{"execute": "' + b"x" * MAX_REQUEST)
    assert answer.last
    assert msgspec.json.decode(answer.reply)["error"]["class"] == "GenericError"


def leaving(action: Callable[..., object], *arguments: object) -> Callable[[NoArguments, Scope], None]:
    """A handler that has something called at the session's end."""

    def leave(_: NoArguments, scope: Scope) -> None:
        scope.callback(action, *arguments)

    return leave


def test_what_commands_leave_behind_ends_with_the_session_last_first(registry: CommandRegistry) -> None:
    ended: list[str] = []
    registry.add_scoped("one", NoArguments, leaving(ended.append, "one"))
    registry.add_scoped("two", NoArguments, leaving(ended.append, "two"))
    session, other = Session(registry), Session(registry)
    raw_answers(session, b'{"execute": "qmp_capabilities"}{"execute": "one"}{"execute": "two"}')
    other.close()
    assert ended == []
    session.close()
    session.close()
    assert ended == ["two", "one"]


@pytest.mark.parametrize(
    ("raised", "told"),
    [(UsageError("no"), UsageError), (KeyError("k"), HandlerError)],
)
def test_end_that_fails_is_told(registry: CommandRegistry, raised: Exception, told: type[Exception]) -> None:
    registry.add_scoped("leave", NoArguments, leaving(fail, raised))
    session = Session(registry)
    raw_answers(session, b'{"execute": "qmp_capabilities"}{"execute": "leave"}')
    with pytest.raises(told):
        session.close()
