from typing import Annotated, Any

import msgspec
import pytest

import dirtylog
from dirtylog.control.qmp.messages import ErrorClass, QMPError, Version, VersionTriple
from dirtylog.control.qmp.registry import (
    NEGOTIATE,
    Arguments,
    Command,
    CommandInfo,
    CommandRegistry,
    NoArguments,
    Scope,
)
from dirtylog.errors import UsageError


class Limits(Arguments, frozen=True):
    max_bandwidth: Annotated[int, msgspec.Meta(ge=0)]
    downtime_limit: float | msgspec.UnsetType = msgspec.UNSET


def nothing(_: msgspec.Struct) -> None:
    return None


def test_added_command_is_found() -> None:
    registry = CommandRegistry()
    registry.add("stop", NoArguments, nothing)
    assert registry.find("stop") == Command("stop", NoArguments, nothing)


def test_unknown_command_is_not_found() -> None:
    with pytest.raises(QMPError, match="no command 'nope'") as caught:
        CommandRegistry().find("nope")
    assert caught.value.error_class is ErrorClass.COMMAND_NOT_FOUND


@pytest.mark.parametrize("name", ["stop", "query-version", NEGOTIATE])
def test_second_command_of_a_name_is_refused(name: str) -> None:
    registry = CommandRegistry()
    registry.add("stop", NoArguments, nothing)
    with pytest.raises(UsageError, match=f"{name!r} already"):
        registry.add(name, NoArguments, nothing)


def test_registries_are_independent() -> None:
    CommandRegistry().add("stop", NoArguments, nothing)
    CommandRegistry().add("stop", NoArguments, nothing)


def test_query_commands_lists_all_commands() -> None:
    registry = CommandRegistry()
    registry.add("stop", NoArguments, nothing)
    names = [NEGOTIATE, "query-commands", "query-version", "stop"]
    assert registry.find("query-commands").handler(NoArguments()) == [CommandInfo(name) for name in names]


def test_query_version_tells_the_version() -> None:
    version = Version(VersionTriple(1, 2, 3), "mine")
    assert CommandRegistry(version).find("query-version").handler(NoArguments()) == version
    assert CommandRegistry().version.package == f"dirtylog {dirtylog.__version__}"


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ({"max-bandwidth": 5}, Limits(max_bandwidth=5)),
        ({"max-bandwidth": 5, "downtime-limit": 300}, Limits(max_bandwidth=5, downtime_limit=300.0)),
    ],
)
def test_arguments_are_parsed_by_their_dashed_names(arguments: dict[str, Any], parsed: Limits) -> None:
    assert Command("c", Limits, nothing).parse(arguments) == parsed


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({}, "parameter 'max-bandwidth' is missing"),
        ({"downtime-limit": 1}, "parameter 'max-bandwidth' is missing"),
        ({"max_bandwidth": 5}, "parameter 'max_bandwidth' is unexpected"),
        ({"max-bandwidth": 5, "x": 1}, "parameter 'x' is unexpected"),
        ({"max-bandwidth": "5"}, "invalid parameter 'max-bandwidth': expected int, got str"),
        ({"max-bandwidth": True}, "invalid parameter 'max-bandwidth': expected int, got bool"),
        ({"max-bandwidth": 5, "downtime-limit": None}, "invalid parameter 'downtime-limit': expected float, got null"),
        ({"max-bandwidth": -1}, "invalid parameter 'max-bandwidth': expected int >= 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], desc: str) -> None:
    with pytest.raises(QMPError) as caught:
        Command("c", Limits, nothing).parse(arguments)
    assert caught.value.error_class is ErrorClass.GENERIC_ERROR
    assert caught.value.desc == desc


def test_scoped_command_is_given_what_ends_with_the_session() -> None:
    registry = CommandRegistry()
    scope = Scope()
    registry.add("plain", NoArguments, lambda _: "plain")
    registry.add_scoped("scoped", NoArguments, lambda _, given: given is scope)
    assert registry.find("plain").run(NoArguments(), scope) == "plain"
    assert registry.find("scoped").run(NoArguments(), scope) is True
    with pytest.raises(UsageError, match="'scoped' already"):
        registry.add_scoped("scoped", NoArguments, lambda _, given: None)
