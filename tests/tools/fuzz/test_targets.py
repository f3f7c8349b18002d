"""The fuzzer's targets on its corpus, and on what hypothesis makes of that: a bounded run of it without its engine."""

import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dirtylog.migration.messages import MAX_BODY, MESSAGES, decode_body
from dirtylog.units import KIB, MIB
from tools.fuzz.record import CORPUS
from tools.fuzz.targets import TARGETS, Target

_INPUTS = {name: [path.read_bytes() for path in sorted((CORPUS / name).iterdir())] for name in TARGETS}
_EACH = pytest.mark.parametrize("name", TARGETS)
_ALLOWED = {"file": 6 * MAX_BODY}
"""Bytes that a target may need whatever its input; a file may say that it is that long, and be it, all holes."""
_ALLOWED_OTHERS = 4 * MIB
_ALLOWED_PER_BYTE = 100
"""And for each byte of input."""

_BOUNDED = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
_MINUTE = settings(_BOUNDED, max_examples=8000)
"""All targets together take about one."""


@pytest.fixture
def target(name: str) -> Target:
    return TARGETS[name]()


def _changed(data: st.DataObject, seeds: list[bytes]) -> bytes:
    """A seed with some bytes replaced, left out, added, or swapped with those of another; or any bytes."""
    seed = data.draw(st.sampled_from([*seeds, b""]))
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(seed)))
        end = min(len(seed), place + data.draw(st.sampled_from([0, 1, 1, 2, 4, 8, 40])))
        other = data.draw(st.sampled_from(seeds))
        cut = data.draw(st.integers(0, len(other)))
        said = data.draw(
            st.one_of(st.binary(max_size=16), st.sampled_from([b"\xff" * 8, b"\x7f", bytes(8), other[cut : cut + 64]]))
        )
        seed = seed[:place] + said + seed[end:]
    return seed


def test_corpus_has_every_message() -> None:
    assert {data[0] for data in _INPUTS["body"]} == set(MESSAGES)


@_EACH
def test_corpus_has_something_valid_for_each_target_and_is_small(name: str) -> None:
    assert _INPUTS[name]
    assert sum(map(len, _INPUTS[name])) < 256 * KIB


@_EACH
def test_target_takes_the_corpus(target: Target, name: str) -> None:  # M5
    for data in _INPUTS[name]:
        target(data)


def test_corpus_of_bodies_is_valid() -> None:
    for data in _INPUTS["body"]:
        assert type(decode_body(MESSAGES[data[0]], data[1:])) is MESSAGES[data[0]]


@_EACH
def test_any_change_of_the_corpus_gives_what_is_valid_or_a_protocol_error(target: Target, name: str) -> None:  # M5
    @_MINUTE
    @given(st.data())
    def run(data: st.DataObject) -> None:
        target(_changed(data, _INPUTS[name]))

    run()


@_EACH
def test_any_bytes_give_what_is_valid_or_a_protocol_error(target: Target, name: str) -> None:  # M5
    @_BOUNDED
    @given(st.binary(max_size=4096))
    def run(data: bytes) -> None:
        target(data)

    run()


@_EACH
def test_input_takes_no_more_memory_than_it_announces(target: Target, name: str) -> None:  # M5
    @settings(_BOUNDED, max_examples=200)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        said = _changed(data, _INPUTS[name])
        tracemalloc.start()
        try:
            target(said)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak <= _ALLOWED.get(name, _ALLOWED_OTHERS) + _ALLOWED_PER_BYTE * len(said)

    run()
