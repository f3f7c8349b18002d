import os
import stat
from pathlib import Path

import pytest
from support.waiting import Task

from benchmarks.support import pulses
from benchmarks.support.pulses import Listener, Pulse, listening, silence
from dirtylog.errors import GuestError, PeerError


def heard(first: Pulse | None, last: Pulse | None) -> Listener:
    """One that has heard that."""
    listener = Listener()
    listener.first, listener.last = first, last
    return listener


def test_first_and_last_of_all_characters_are_kept_with_their_times(tmp_path: Path) -> None:
    path = tmp_path / "serial"
    with listening(path) as listener:
        assert stat.S_ISFIFO(path.stat().st_mode)
        with path.open("wb", buffering=0) as writer:
            writer.write(b"AB")
            assert listener.until(lambda: listener.last is not None and listener.last.character == ord("B"))
            writer.write(b"CD")
            assert listener.until(lambda: listener.last is not None and listener.last.character == ord("D"))
    assert listener.first is not None
    assert listener.last is not None
    assert listener.first.character == ord("A")
    assert listener.first.at < listener.last.at


def test_writer_that_opens_without_waiting_finds_a_reader_and_may_come_again(tmp_path: Path) -> None:
    path = tmp_path / "serial"
    with listening(path) as listener:
        for character in (b"A", b"B"):
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            os.write(fd, character)
            os.close(fd)
    assert listener.last is not None
    assert listener.last.character == ord("B")


def test_writer_never_waits_for_a_listener(tmp_path: Path) -> None:
    path = tmp_path / "serial"
    with listening(path) as listener, path.open("wb", buffering=0) as writer:
        for _ in range(64):  # sixteen times what a pipe holds
            writer.write(bytes(1 << 14))
    assert listener.last is not None


def test_listener_ends_with_what_goes_wrong_around_it(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="it"), listening(tmp_path / "serial"):
        raise GuestError("it")


def test_silence_is_from_the_last_character_here_to_the_first_there() -> None:
    source = heard(Pulse(1.0, ord("A")), Pulse(2.0, 255))
    assert silence(source, heard(Pulse(2.25, 0), Pulse(9.0, 7))) == 0.25


def test_last_character_may_be_heard_after_the_first_on_the_other_side(tmp_path: Path) -> None:
    found: list[float] = []
    there = heard(Pulse(2.25, ord("C")), Pulse(9.0, 7))
    with listening(tmp_path / "serial") as source, (tmp_path / "serial").open("wb", buffering=0) as writer:
        writer.write(b"A")
        task = Task(lambda: found.append(silence(source, there)))
        assert source.until(lambda: source.last is not None)
        writer.write(b"B")
        task.join()
    assert source.last is not None
    assert found == [2.25 - source.last.at]


@pytest.mark.parametrize("last", [Pulse(2.0, 7), Pulse(2.0, 5), None], ids=["repeated", "lost", "never heard"])
def test_character_that_is_not_the_next_is_an_error(monkeypatch: pytest.MonkeyPatch, last: Pulse | None) -> None:
    monkeypatch.setattr(pulses, "ARRIVAL_SECONDS", 0.01)
    first = Pulse(2.25, 7)
    with pytest.raises(GuestError, match="not the next character"):
        silence(heard(last, last), heard(first, first))


def test_guest_that_is_not_heard_where_it_arrived_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulses, "ARRIVAL_SECONDS", 0.01)
    with pytest.raises(PeerError, match="nothing was heard"):
        silence(heard(None, Pulse(1.0, 1)), Listener())
