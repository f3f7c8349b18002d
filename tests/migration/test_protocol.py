import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog.errors import ProtocolError, UsageError
from dirtylog.migration.messages import (
    HEAD,
    MAGIC,
    MAX_BODY,
    MESSAGES,
    VERSION,
    Digests,
    EncodedPages,
    Failed,
    Handover,
    Hello,
    Join,
    Joined,
    Lacking,
    Message,
    Owed,
    Page,
    Pages,
    PassDone,
    PassEnd,
    Ready,
    Request,
    Resume,
    Resumed,
    Shared,
    State,
    Taken,
    Welcome,
    ZeroPage,
    ZeroPages,
    encode,
)
from dirtylog.migration.protocol import SENDERS, TRANSITIONS, Protocol, Role, Stage

_RUNS = np.array([[0, 1]], np.int64)
_EXAMPLES: dict[type[Message], Message] = {
    Hello: Hello("fake", (), False, 1, bytes(16), False, False),
    Welcome: Welcome("boot", 1, 1),
    Pages: Pages(0, _RUNS),
    ZeroPages: ZeroPages(0, _RUNS),
    PassEnd: PassEnd(1),
    PassDone: PassDone(1, 0, 0, 0),
    Digests: Digests(()),
    State: State(True, {}),
    Ready: Ready((), 0),
    Handover: Handover(),
    Taken: Taken(),
    Failed: Failed("why"),
    EncodedPages: EncodedPages(0, _RUNS, size=9, difference=True),
    Join: Join(bytes(16)),
    Joined: Joined(),
    Shared: Shared(1),
    Owed: Owed(0, _RUNS),
    Request: Request(0, 3),
    Page: Page(0, 3),
    ZeroPage: ZeroPage(0, 3),
    Resume: Resume(bytes(16)),
    Lacking: Lacking(0, _RUNS),
    Resumed: Resumed(),
}

# What may be said when, by whom, and what it leads to: written out here a second time, on purpose.
_ALLOWED = """
OPENING      source       Hello      OFFERED
OPENING      source       Failed     FAILED
OPENING      destination  Failed     FAILED
OFFERED      destination  Welcome    STREAMING
OFFERED      source       Failed     FAILED
OFFERED      destination  Failed     FAILED
OPENING      source       Join       JOINING
JOINING      destination  Joined     SIDE
JOINING      source       Failed     FAILED
JOINING      destination  Failed     FAILED
SIDE         source       Pages      SIDE
SIDE         source       ZeroPages  SIDE
SIDE         source       EncodedPages SIDE
SIDE         source       PassEnd    SIDE_ENDED
SIDE         destination  Request    SIDE
SIDE         source       Page       SIDE
SIDE         source       ZeroPage   SIDE
SIDE         source       Failed     FAILED
SIDE         destination  Failed     FAILED
SIDE_ENDED   destination  PassDone   SIDE
SIDE_ENDED   source       Failed     FAILED
SIDE_ENDED   destination  Failed     FAILED
STREAMING    source       Pages      STREAMING
STREAMING    source       ZeroPages  STREAMING
STREAMING    source       EncodedPages STREAMING
STREAMING    source       PassEnd    PASS_ENDED
STREAMING    source       Digests    DIGESTED
STREAMING    source       State      STATE_SENT
STREAMING    source       Failed     FAILED
STREAMING    destination  Failed     FAILED
STREAMING    source       Shared     SHARED
SHARED       destination  PassDone   SHARED
SHARED       source       Digests    DIGESTED
SHARED       source       State      STATE_SENT
SHARED       source       Failed     FAILED
SHARED       destination  Failed     FAILED
PASS_ENDED   destination  PassDone   STREAMING
PASS_ENDED   source       Failed     FAILED
PASS_ENDED   destination  Failed     FAILED
DIGESTED     source       State      STATE_SENT
DIGESTED     source       Failed     FAILED
DIGESTED     destination  Failed     FAILED
STATE_SENT   destination  Ready      READY
STATE_SENT   source       Failed     FAILED
STATE_SENT   destination  Failed     FAILED
READY        source       Handover   HANDED_OVER
READY        source       Failed     FAILED
READY        destination  Failed     FAILED
HANDED_OVER  destination  Taken      TAKEN
HANDED_OVER  source       Failed     FAILED
HANDED_OVER  destination  Failed     FAILED
STREAMING    source       Owed       OWING
OWING        source       Owed       OWING
OWING        source       State      OWING_STATE_SENT
OWING        source       Failed     FAILED
OWING        destination  Failed     FAILED
OWING_STATE_SENT  destination  Ready       OWING_READY
OWING_STATE_SENT  source       Failed      FAILED
OWING_STATE_SENT  destination  Failed      FAILED
OWING_READY  source       Handover   OWING_HANDED_OVER
OWING_READY  source       Failed     FAILED
OWING_READY  destination  Failed     FAILED
OWING_HANDED_OVER  destination  Taken   SERVING
OWING_HANDED_OVER  source       Failed  FAILED
OWING_HANDED_OVER  destination  Failed  FAILED
SERVING      source       Pages      SERVING
SERVING      source       ZeroPages  SERVING
SERVING      source       PassEnd    SERVED
SERVING      source       Failed     FAILED
SERVING      destination  Failed     FAILED
SERVED       destination  PassDone   FINISHED
SERVED       source       Failed     FAILED
SERVED       destination  Failed     FAILED
OPENING      source       Resume     RESUMING
RESUMING     destination  Lacking    RESUMING
RESUMING     destination  Resumed    SERVING
RESUMING     source       Failed     FAILED
RESUMING     destination  Failed     FAILED
"""
_NEXT = {
    (Stage[stage], Role(sender), name): Stage[following]
    for stage, sender, name, following in (line.split() for line in _ALLOWED.strip().splitlines())
}
_EVERYTHING = pytest.mark.parametrize(
    ("stage", "sender", "kind"),
    [(stage, sender, kind) for stage in Stage for sender in Role for kind in MESSAGES.values()],
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", "")),
)


def _at(role: Role, stage: Stage) -> Protocol:
    protocol = Protocol(role)
    assert protocol.receive(Protocol.preamble()) is None
    protocol.stage = stage
    return protocol


def _other(role: Role) -> Role:
    return Role.DESTINATION if role is Role.SOURCE else Role.SOURCE


@_EVERYTHING
def test_side_says_only_what_the_table_allows(stage: Stage, sender: Role, kind: type[Message]) -> None:
    protocol = _at(sender, stage)
    following = _NEXT.get((stage, sender, kind.__name__))
    if following is None:
        with pytest.raises(UsageError, match=f"the {sender.value} cannot send {kind.__name__} when {stage.name}"):
            protocol.send(_EXAMPLES[kind])
        assert protocol.stage is stage
    else:
        assert protocol.send(_EXAMPLES[kind]) == encode(_EXAMPLES[kind])
        assert protocol.stage is following


@_EVERYTHING
def test_side_takes_only_what_the_table_allows(stage: Stage, sender: Role, kind: type[Message]) -> None:  # M5
    protocol = _at(_other(sender), stage)
    following = _NEXT.get((stage, sender, kind.__name__))
    frame = encode(_EXAMPLES[kind])
    if following is None:
        # Refused at the head: the body of what is not allowed is not even waited for.
        with pytest.raises(ProtocolError, match=f"the {sender.value} sent {kind.__name__} when {stage.name}"):
            protocol.receive(frame[: HEAD.size])
        assert protocol.stage is stage
    else:
        assert protocol.receive(frame[: HEAD.size]) is None
        assert protocol.stage is stage
        assert protocol.receive(frame[HEAD.size :]) == _EXAMPLES[kind]
        assert protocol.stage is following


def test_tables_name_every_message_and_no_way_leads_on_from_the_end() -> None:
    assert set(SENDERS) == set(MESSAGES.values()) == {kind for _, kind in TRANSITIONS}
    assert not {Stage.TAKEN, Stage.FINISHED, Stage.FAILED} & {stage for stage, _ in TRANSITIONS}


def test_guest_changes_hands_in_one_order_only() -> None:  # M1
    def before(stage: Stage) -> set[Stage]:
        return {start for (start, _), end in TRANSITIONS.items() if end is stage}

    assert before(Stage.TAKEN) == {Stage.HANDED_OVER}
    assert before(Stage.HANDED_OVER) == {Stage.READY}
    assert before(Stage.READY) == {Stage.STATE_SENT}
    assert before(Stage.SERVING) == {Stage.OWING_HANDED_OVER, Stage.RESUMING, Stage.SERVING}
    assert before(Stage.OWING_HANDED_OVER) == {Stage.OWING_READY}
    assert before(Stage.OWING_READY) == {Stage.OWING_STATE_SENT}


def test_connection_that_resumes_never_hands_the_guest_over() -> None:  # M1
    assert _reached(Stage.RESUMING) == {Stage.RESUMING, Stage.SERVING, Stage.SERVED, Stage.FINISHED, Stage.FAILED}


def _reached(start: Stage) -> set[Stage]:
    """The stages that a conversation at one of them can come to."""
    reached, more = set[Stage](), {start}
    while more:
        reached |= more
        more = {end for (begin, _), end in TRANSITIONS.items() if begin in reached} - reached
    return reached


def test_side_channel_never_leads_to_the_guest() -> None:  # M1
    assert _reached(Stage.SIDE) == {Stage.SIDE, Stage.SIDE_ENDED, Stage.FAILED}


def test_preamble_is_magic_and_version() -> None:
    assert Protocol.preamble() == b"DIRTYLOG\x05\x00\x00\x00" == MAGIC + struct.pack("<I", VERSION)


def test_peer_that_speaks_tls_is_told_from_others() -> None:
    with pytest.raises(ProtocolError, match="the source speaks TLS, and this side does not") as caught:
        Protocol(Role.DESTINATION).receive(bytes.fromhex("160301014001 00013c030300 "))
    assert caught.value.remedy is not None
    assert "--tls-creds" in caught.value.remedy


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n", b"QEVM\x00\x00\x00\x03 padding", b"dirtylog\x04\x00\x00\x00", bytes(12), b"\xff" * 12],
)
def test_peer_that_speaks_something_else_is_refused(role: Role, data: bytes) -> None:  # M5
    protocol = Protocol(role)
    with pytest.raises(ProtocolError, match="does not speak dirtylog's migration protocol") as caught:
        protocol.receive(data[: protocol.wanted])
    assert caught.value.remedy == "check the address: another program answers there"
    assert _other(role).value in caught.value.cause


@pytest.mark.parametrize("version", [0, 4, VERSION + 1, 0xFFFF_FFFF])
def test_peer_of_another_version_is_refused(version: int) -> None:  # M5
    with pytest.raises(ProtocolError, match=f"speaks version {version} of the migration protocol, this side {VERSION}"):
        Protocol(Role.DESTINATION).receive(MAGIC + struct.pack("<I", version))


@pytest.mark.parametrize("size", [0, 11, 13])
def test_handing_in_another_number_of_bytes_than_wanted_is_misuse(size: int) -> None:
    with pytest.raises(UsageError, match=f"{size} bytes were handed in, not the 12 wanted"):
        Protocol(Role.SOURCE).receive(bytes(size))


def test_frame_without_a_body_is_complete_with_no_more_bytes() -> None:
    protocol = _at(Role.DESTINATION, Stage.READY)
    protocol.receive(HEAD.pack(Handover.TYPE, 0, 0))
    assert protocol.wanted == 0
    with pytest.raises(ProtocolError, match="not a Handover message"):
        protocol.receive(b"")


@given(st.sampled_from(Role), st.sampled_from(Stage), st.binary(max_size=300))
def test_any_bytes_give_messages_or_a_protocol_error(role: Role, stage: Stage, data: bytes) -> None:  # M5
    protocol = _at(role, stage)
    while True:
        assert protocol.wanted <= MAX_BODY
        taken, data = data[: protocol.wanted], data[protocol.wanted :]
        if len(taken) < protocol.wanted:
            return
        try:
            message = protocol.receive(taken)
        except ProtocolError:
            return
        assert message is None or type(message) in SENDERS
