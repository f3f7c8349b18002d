from typing import Any

import pytest

from benchmarks.support.peers import Dirtylog
from dirtylog.errors import ProtocolError

PASS = {
    "number": 1,
    "pages": 10,
    "zero-pages": 20,
    "bytes": 41_000,
    "seconds": 0.5,
    "starved": 0.25,
    "dirtied": 5,
    "bandwidth": 1e6,
    "expected-downtime": 0.03,
}


def test_passes_are_those_of_query_migrate() -> None:
    last = PASS | {"number": 2, "expected-downtime": None}
    passes = Dirtylog().each_pass({"status": "completed", "x-passes": [PASS, last]})
    assert [one.number for one in passes] == [1, 2]
    assert [one.zero_pages for one in passes] == [20, 20]
    assert [one.expected_downtime for one in passes] == [0.03, None]


@pytest.mark.parametrize(
    "info",
    [{}, {"x-passes": 3}, {"x-passes": [{"number": 1}]}, {"x-passes": [PASS | {"bytes": "many"}]}],
    ids=["absent", "no list", "incomplete", "wrong type"],
)
def test_reply_without_proper_passes_is_refused(info: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="does not describe the passes"):
        Dirtylog().each_pass(info)
