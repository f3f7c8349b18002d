import errno
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oracles import to_bits, to_words

from dirtylog.display import Sample, TraceReader, TraceWriter
from dirtylog.display.trace import HEAD, MAGIC, MAX_PAGES, PREAMBLE, VERSION, TracedBlock, TracedSample, TraceHeader
from dirtylog.errors import ClosedError, HostError, UsageError
from dirtylog.memory import PageBitmap
from dirtylog.units import PAGE_SIZE

BLOCKS: Final = {"ram": 200, "rom": 3}
PAGE: Final = Path(__file__).parents[2] / "docs/trace-format.md"


def sample(number: int, ram: set[int], rom: set[int]) -> Sample:
    written = {"ram": PageBitmap(200, to_words(ram, 200)), "rom": PageBitmap(3, to_words(rom, 3))}
    return Sample(float(number), 1.0, written)


SAMPLES: Final = [sample(1, {0, 199}, set()), sample(2, set(), set()), sample(3, set(range(200)), {2})]


def write(path: Path, samples: list[Sample] = SAMPLES) -> None:
    with TraceWriter(path, BLOCKS, 1234.5) as trace:
        for one in samples:
            trace.append(one)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "trace"
    write(path)
    return path


def record(body: bytes) -> bytes:
    return HEAD.pack(len(body), zlib.crc32(body)) + body


def header(**changes: Any) -> dict[str, Any]:
    blocks = [{"name": name, "pages": pages, "stored": 0} for name, pages in BLOCKS.items()]
    return {"start_time": 1.0, "page_size": PAGE_SIZE, "blocks": blocks} | changes


def block(name: str = "ram", *, pages: int = 1, stored: int = 0) -> dict[str, Any]:
    return {"name": name, "pages": pages, "stored": stored}


def traced(**changes: Any) -> dict[str, Any]:
    return {"time": 1.0, "seconds": 1.0, "written": [b"", b""]} | changes


def trace_of(*records: object) -> bytes:
    return PREAMBLE.pack(MAGIC, VERSION) + b"".join(record(msgspec.msgpack.encode(one)) for one in records)


def facts(samples: list[Sample]) -> list[object]:
    return [
        (one.time, one.seconds, {name: to_bits(bitmap.words) for name, bitmap in one.written.items()})
        for one in samples
    ]


def test_trace_says_what_was_sampled(path: Path) -> None:
    trace = TraceReader(path)
    assert (trace.start_time, trace.blocks) == (1234.5, BLOCKS)
    assert facts(list(trace)) == facts(SAMPLES)
    assert facts(list(trace)) == facts(SAMPLES)


def test_trace_says_how_many_pages_had_contents(tmp_path: Path) -> None:
    stored = {"rom": 3, "ram": 0}
    TraceWriter(tmp_path / "trace", BLOCKS, stored=stored).close()
    assert TraceReader(tmp_path / "trace").stored == stored


def test_all_pages_have_contents_unless_told_otherwise(path: Path) -> None:
    assert TraceReader(path).stored == BLOCKS


@given(st.lists(st.tuples(st.sets(st.integers(0, 199)), st.sets(st.integers(0, 2))), max_size=4))
def test_any_samples_survive(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[set[int], set[int]]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    samples = [sample(number, *pages) for number, pages in enumerate(written)]
    write(path, samples)
    assert facts(list(TraceReader(path))) == facts(samples)


def test_each_sample_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with TraceWriter(path, BLOCKS) as trace:
        for number, one in enumerate(SAMPLES, 1):
            trace.append(one)
            assert len(list(TraceReader(path))) == number


def test_start_time_is_the_present_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dirtylog.display.trace.time.time", lambda: 77.0)
    TraceWriter(tmp_path / "trace", BLOCKS).close()
    assert TraceReader(tmp_path / "trace").start_time == 77.0


def test_trace_cut_anywhere_has_the_samples_before_the_cut(path: Path) -> None:
    whole = path.read_bytes()
    lengths: list[int] = []
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        try:
            found = list(TraceReader(path))
        except UsageError:
            assert not lengths, "a cut in a sample is no error"
            continue
        assert facts(found) == facts(SAMPLES[: len(found)])
        lengths.append(len(found))
    assert set(lengths) == {0, 1, 2}
    assert lengths == sorted(lengths)


def test_any_byte_changed_is_found_or_ends_the_trace(path: Path) -> None:
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            found = list(TraceReader(path))
        except UsageError:
            continue
        assert facts(found) == facts(SAMPLES[: len(found)])
        assert len(found) < len(SAMPLES)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "does not start as one"),
        (b"DIRTYLOG" + bytes(100), "does not start as one"),
        (PREAMBLE.pack(MAGIC, 2), "has version 2, and this dirtylog reads version 1"),
        (PREAMBLE.pack(MAGIC, VERSION), "ends in its header"),
        (PREAMBLE.pack(MAGIC, VERSION) + HEAD.pack(1 << 31, 0), "a record has 2147483648 bytes"),
        (trace_of([]), "Expected `object`"),
        (trace_of(header() | {"more": 1}), "unknown field"),
        (trace_of(header(page_size=16384)), "pages have 16384 bytes"),
        (trace_of(header(start_time=-1.0)), "start_time"),
        (trace_of(header(start_time=float("inf"))), "its start has no time"),
        (trace_of(header(blocks=[block(pages=0)])), "pages"),
        (trace_of(header(blocks=[block(pages=MAX_PAGES + 1)])), "pages"),
        (trace_of(header(blocks=[block(name, pages=MAX_PAGES) for name in "ab"])), "more than 4294967296 pages"),
        (trace_of(header(blocks=[block(), block()])), "same name"),
        (trace_of(header(blocks=[block(stored=2)])), "more pages have contents than there are"),
        (trace_of(header(blocks=[block(stored=-1)])), "stored"),
        (trace_of(header(blocks=[{"name": "ram", "pages": 1}])), "missing required field `stored`"),
    ],
)
def test_file_that_is_no_trace_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "trace").write_bytes(content)
    with pytest.raises(UsageError, match=problem) as caught:
        TraceReader(tmp_path / "trace")
    assert caught.value.remedy is not None


@pytest.mark.parametrize(
    ("samples", "problem"),
    [
        ([traced(written=[b""])], "1 bitmaps for 2 blocks"),
        ([traced(written=[b"", zlib.compress(bytes(16))])], "does not have 3 pages"),
        ([traced(written=[b"", b"nonsense"])], "is damaged"),
        ([traced(time=float("nan"))], "time"),
        ([traced(time=float("inf"))], "no time"),
        ([traced(seconds=-1.0)], "seconds"),
        ([traced(time=2.0), traced(time=1.0)], "older than the one before"),
        ([traced() | {"more": 1}], "unknown field"),
        ([{"time": 1.0}], "missing required field"),
    ],
)
def test_sample_that_cannot_be_is_refused(tmp_path: Path, samples: list[Mapping[str, Any]], problem: str) -> None:
    (tmp_path / "trace").write_bytes(trace_of(header(), *samples))
    with pytest.raises(UsageError, match=problem):
        list(TraceReader(tmp_path / "trace"))


def test_record_longer_than_its_blocks_explain_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(trace_of(header()) + struct.pack("<II", 10_000, 0))
    with pytest.raises(UsageError, match="a record has 10000 bytes"):
        list(TraceReader(tmp_path / "trace"))


def test_pipe_is_no_trace(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "trace")
    with pytest.raises(UsageError, match="it is not a file"):
        TraceReader(tmp_path / "trace")


def test_missing_file_is_reported_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{re.escape(str(tmp_path))}/trace cannot be read: No such file"):
        TraceReader(tmp_path / "trace")


@pytest.mark.parametrize("name", ["missing/trace", ".", "fifo"])
def test_place_that_cannot_be_written_is_reported(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(HostError, match="cannot write the trace") as caught:
        TraceWriter(tmp_path / name, BLOCKS)
    assert caught.value.remedy is not None


def test_full_disk_is_reported_and_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        closed = False

        def write(self, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with TraceWriter(path, BLOCKS) as trace:
        trace.append(SAMPLES[0])
        with monkeypatch.context() as patch:
            patch.setattr(trace, "_file", Full())
            with pytest.raises(HostError, match="No space left on device"):
                trace.append(SAMPLES[1])
    assert facts(list(TraceReader(path))) == facts(SAMPLES[:1])


def test_short_writes_are_carried_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = TraceWriter(path, BLOCKS)
    file = trace._file

    class Slow:
        closed = False

        def write(self, data: memoryview) -> int:
            return file.write(data[:5])

    with monkeypatch.context() as patch:
        patch.setattr(trace, "_file", Slow())
        trace.append(SAMPLES[2])
    trace.close()
    assert facts(list(TraceReader(path))) == facts(SAMPLES[2:])


def test_sample_of_other_memory_is_not_recorded(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "trace", BLOCKS) as trace, pytest.raises(UsageError, match="not of the memory"):
        trace.append(Sample(1.0, 1.0, {"ram": PageBitmap(200)}))


def test_closed_trace_takes_no_sample(tmp_path: Path) -> None:
    trace = TraceWriter(tmp_path / "trace", BLOCKS)
    trace.close()
    trace.close()
    with pytest.raises(ClosedError):
        trace.append(SAMPLES[0])


def test_description_of_the_format_names_every_field_and_number() -> None:
    text = PAGE.read_text()
    for kind in (TraceHeader, TracedBlock, TracedSample):
        for field in kind.__struct_fields__:
            assert f"`{field}`" in text
    assert f"`{MAGIC.decode()}`" in text
    assert f"Version {VERSION}." in text
