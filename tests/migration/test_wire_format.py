import re
from pathlib import Path

import msgspec
import pytest

from dirtylog.migration import channel, letting_go, reception, remainder
from dirtylog.migration.messages import (
    HEAD,
    MAGIC,
    MAX_BATCH_PAGES,
    MAX_BODY,
    MAX_CHANNELS,
    MAX_FACTS_BODY,
    MAX_FILES,
    MAX_NAME,
    MAX_NAMES,
    MAX_PARTS,
    MAX_RUNS,
    MAX_SHORT_BODY,
    MESSAGES,
    PREAMBLE,
    VERSION,
    Failed,
    RunTable,
)
from dirtylog.migration.protocol import SENDERS, TRANSITIONS, Role, Stage
from dirtylog.units import MIB

_PAGE = Path(__file__).parents[2] / "docs" / "wire-format.md"


@pytest.fixture(scope="module")
def tables() -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """The page's tables: the column names, and the rows."""
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    rows: list[tuple[str, ...]] = []
    for line in _PAGE.read_text().splitlines():
        if not line.startswith("|"):
            rows = []
            continue
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        if rows:
            rows.append(cells)
            continue
        rows = [cells]
        found.setdefault(cells, rows)
    return {header: table[2:] for header, table in found.items()}


Tables = dict[tuple[str, ...], list[tuple[str, ...]]]


def test_page_has_every_message_with_its_number_and_sender(tables: Tables) -> None:
    senders = {"source": {Role.SOURCE}, "destination": {Role.DESTINATION}, "either": set(Role)}
    rows = tables["type", "name", "sender", "body", "says"]
    documented = [(int(number), name, senders[sender]) for number, name, sender, *_ in rows]
    assert documented == [(number, kind.__name__, set(SENDERS[kind])) for number, kind in sorted(MESSAGES.items())]


def test_page_has_every_field(tables: Tables) -> None:
    in_list = {
        name: re.findall(r"`(\w+)`", body)
        for _, name, _, body, _ in tables["type", "name", "sender", "body", "says"]
        if body != "run table"
    }
    described: dict[str, list[str]] = {name: [] for name in in_list}
    for name, field, _ in tables["message", "field", "value"]:
        described[name].append(field.strip("`"))
    fields = {
        kind.__name__: [field.name for field in msgspec.structs.fields(kind)]
        for kind in MESSAGES.values()
        if not issubclass(kind, RunTable)
    }
    assert in_list == described == fields


def test_page_has_every_transition(tables: Tables) -> None:
    *documented, failing = tables["stage", "message", "next stage"]
    failed = {key: stage for key, stage in TRANSITIONS.items() if key[1] is Failed}
    assert [(stage.name, kind.__name__, following.name) for (stage, kind), following in TRANSITIONS.items()][
        : -len(failed)
    ] == documented
    assert failing == ("any but TAKEN, FINISHED, FAILED", "Failed", "FAILED")
    assert {stage for stage, _ in failed} == set(Stage) - {Stage.TAKEN, Stage.FINISHED, Stage.FAILED}


def test_page_has_the_limits(tables: Tables) -> None:
    limits = {what: bound for what, bound in tables["what", "at most"]}  # noqa: C416 - rows of any length to the types
    assert limits["length of a body, `State`"] == f"{MAX_BODY} bytes"
    growing = "length of a body, `Hello`, `Digests`, `Ready` and those with run tables"
    assert limits[growing] == f"{MAX_SHORT_BODY} bytes"
    assert limits["length of a body, any other"] == f"{MAX_FACTS_BODY} bytes"
    assert limits["parts in a `State`"] == str(MAX_PARTS)
    assert limits["names in a part"] == str(MAX_NAMES)
    assert limits["characters in the name of a part, or in one in it"] == str(MAX_NAME)
    assert limits["runs in a table"] == str(MAX_RUNS)
    assert limits["pages in one `Pages` or `EncodedPages`"] == str(MAX_BATCH_PAGES)
    assert limits["channels"] == str(MAX_CHANNELS)
    assert limits["descriptors"] == str(MAX_FILES)


def test_page_has_preamble_head_and_times(tables: Tables) -> None:
    text = _PAGE.read_text()
    assert f"Version {VERSION}." in text
    assert f"`{MAGIC.decode()}`" in text
    assert (PREAMBLE.size, HEAD.size) == (12, 8)
    assert f"`{channel._WITH_FILES.hex()}` (`{channel._WITH_FILES.decode()}`)" in text
    silence = {(who, what): bound for who, what, bound in tables["who", "waits for", "at most"]}
    handshake = f"{channel.HANDSHAKE_TIMEOUT:.0f} s"
    assert silence["either", "the end of the handshake of TLS"] == handshake
    assert silence["source", "the next byte, until `Welcome`"] == handshake
    assert silence["destination", "all of a connection's first message"] == handshake
    stall = f"{channel.STALL_TIMEOUT:.0f} s"
    assert silence["source", "a byte to move, in either direction, after `Welcome`"] == stall
    assert silence["destination", "all further channels, after `Welcome`"] == handshake
    assert f"keeps {reception.MAX_VISITORS} connections at most" in text
    assert f"not within its first {reception.GRACE} s" in text
    assert silence["source, with `verify`", "`Ready`"].startswith(f"{stall}, and 1 s more for each 200 MiB")
    assert remainder._SLOW_DIGEST == 200 * MIB
    assert f"waited for {letting_go._GONE_TIMEOUT:.0f} s" in text
    assert f"up to {channel._DRAIN_SECONDS:.0f} s" in text
