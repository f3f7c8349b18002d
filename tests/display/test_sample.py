import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oracles import to_bits, to_words

from dirtylog.display import Sample, pack, packed_bound, unpack
from dirtylog.errors import ProtocolError
from dirtylog.memory import PageBitmap


@given(pages=st.integers(0, 300), data=st.data())
def test_bitmap_survives_packing(pages: int, data: st.DataObject) -> None:
    bits = data.draw(st.sets(st.integers(0, pages - 1)) if pages else st.just(set()))

    packed = pack(PageBitmap(pages, to_words(bits, pages)))

    assert to_bits(unpack(packed, pages).words) == bits
    assert bool(packed) == bool(bits)
    assert len(packed) <= packed_bound(pages)


def test_bitmap_that_cannot_be_compressed_keeps_to_the_bound() -> None:
    words = np.random.default_rng(1).integers(0, 1 << 63, 1 << 16, np.uint64)
    assert len(pack(PageBitmap(64 << 16, words))) <= packed_bound(64 << 16)


def test_unpacked_bitmap_may_be_changed() -> None:
    bitmap = unpack(pack(PageBitmap(3, to_words([1], 3))), 3)
    bitmap.set(2, 1)
    assert to_bits(bitmap.words) == {1, 2}


@pytest.mark.parametrize(
    ("packed", "problem"),
    [
        (b"nonsense", "is damaged"),
        (zlib.compress(bytes(8))[:-1], "does not have 10 pages"),
        (zlib.compress(bytes(8)) + b"x", "does not have 10 pages"),
        (zlib.compress(bytes(7)), "does not have 10 pages"),
        (zlib.compress(bytes(16)), "does not have 10 pages"),
        (zlib.compress(bytes(1 << 20)), "does not have 10 pages"),
        (zlib.compress((1 << 10).to_bytes(8, "little")), "has a page past its end"),
    ],
    ids=["no stream", "cut", "more behind", "short", "long", "much longer", "page 10"],
)
def test_bytes_that_are_no_such_bitmap_are_refused(packed: bytes, problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        unpack(packed, 10)


def test_sample_counts_the_pages_of_all_blocks() -> None:
    written = {"a": PageBitmap(70, to_words([1, 69], 70)), "b": PageBitmap(5, to_words([0], 5))}
    assert Sample(4.0, 2.0, written).pages == 3
    assert Sample(4.0, 2.0, written).rate == 1.5
    assert Sample(4.0, 0.0, written).rate == 0.0
