import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.devices import ByteDevice, Call

from dirtylog.errors import AccessError
from dirtylog.memory import AccessSizes, MemoryRegionOps
from dirtylog.memory.access import ByteOrder, access_size, read_register, write_register

SIZE = 64
SIZES = [1, 2, 4, 8]

access_sizes = st.builds(
    lambda ends, unaligned: AccessSizes(min(ends), max(ends), unaligned),
    st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES)),
    st.booleans(),
)
byte_orders: st.SearchStrategy[ByteOrder] = st.sampled_from(["little", "big"])
accesses = st.sampled_from(SIZES).flatmap(lambda size: st.tuples(st.integers(0, SIZE - 16), st.just(size)))


@pytest.mark.parametrize(("smallest", "largest"), [(0, 4), (1, 16), (3, 4), (1, 3), (4, 2), (-1, 1)])
def test_sizes_that_no_bus_has_are_refused(smallest: int, largest: int) -> None:
    with pytest.raises(ValueError, match=f"accesses of {smallest} to {largest} bytes"):
        AccessSizes(smallest, largest)


@pytest.mark.parametrize(
    ("offset", "size", "allowed"),
    [(0, 2, True), (2, 4, True), (6, 2, True), (0, 1, False), (0, 8, False), (1, 2, False), (4, 4, True)],
)
def test_access_is_allowed_by_size_and_alignment(offset: int, size: int, allowed: bool) -> None:  # A2
    aligned, anywhere = AccessSizes(2, 4), AccessSizes(2, 4, unaligned=True)
    assert aligned.allow(offset, size) == (allowed and offset % size == 0)
    assert anywhere.allow(offset, size) == (2 <= size <= 4)


@pytest.mark.parametrize(
    ("valid", "offset", "left", "size"),
    [
        (AccessSizes(1, 4), 0, 100, 4),
        (AccessSizes(1, 4), 2, 100, 2),
        (AccessSizes(1, 4), 3, 100, 1),
        (AccessSizes(1, 4), 4, 3, 2),
        (AccessSizes(1, 8), 4, 100, 4),
        (AccessSizes(1, 8), 8, 7, 4),
        (AccessSizes(1, 4, unaligned=True), 3, 100, 4),
        (AccessSizes(1, 4, unaligned=True), 3, 3, 2),
    ],
)
def test_longer_transfer_is_cut_into_the_largest_accesses_that_are_accepted(
    valid: AccessSizes, offset: int, left: int, size: int
) -> None:  # A2
    assert access_size(ByteDevice(SIZE, valid=valid), offset, left) == size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("byte_order", ["little", "big"])
def test_value_is_in_the_devices_byte_order_and_bytes_in_memory_order(size: int, byte_order: ByteOrder) -> None:  # A4
    device = ByteDevice(SIZE, byte_order=byte_order)
    data = bytes(range(1, size + 1))

    write_register(device, 8, data)

    assert device.calls == [Call("write", 8, size, int.from_bytes(data, byte_order))]
    assert read_register(device, 8, size) == data


@pytest.mark.parametrize("byte_order", ["little", "big"])
def test_wide_access_is_cut_into_what_the_device_implements(byte_order: ByteOrder) -> None:  # A3 A4
    device = ByteDevice(SIZE, implemented=AccessSizes(1, 2), byte_order=byte_order)
    write_register(device, 8, bytes.fromhex("0102030405060708"))

    values = [0x0102, 0x0304, 0x0506, 0x0708] if byte_order == "big" else [0x0201, 0x0403, 0x0605, 0x0807]
    assert device.calls == [Call("write", 8 + 2 * n, 2, value) for n, value in enumerate(values)]
    assert read_register(device, 8, 8) == bytes.fromhex("0102030405060708")


@pytest.mark.parametrize("byte_order", ["little", "big"])
def test_narrow_read_is_a_part_of_the_narrowest_that_the_device_implements(byte_order: ByteOrder) -> None:  # A3
    device = ByteDevice(SIZE, implemented=AccessSizes(4, 4), byte_order=byte_order)
    device.registers[:8] = bytes.fromhex("0102030405060708")

    assert read_register(device, 5, 1) == b"\6"
    assert [call[:3] for call in device.calls] == [("read", 4, 4)]


def test_narrow_write_keeps_the_bytes_beside_it() -> None:  # A3
    device = ByteDevice(SIZE, implemented=AccessSizes(4, 4))
    device.registers[:8] = bytes.fromhex("0102030405060708")

    write_register(device, 6, b"\xaa")

    assert device.calls == [Call("read", 4, 4, 0x08070605), Call("write", 4, 4, 0x08AA0605)]


def test_unaligned_access_is_made_of_aligned_ones_where_the_device_wants_these() -> None:  # A3
    device = ByteDevice(SIZE, valid=AccessSizes(1, 8, unaligned=True), implemented=AccessSizes(2, 4))
    device.registers[:16] = bytes(range(16))

    assert read_register(device, 3, 4) == bytes([3, 4, 5, 6])
    assert [call[:3] for call in device.calls] == [("read", 2, 2), ("read", 4, 2), ("read", 6, 2)]
    device.calls.clear()
    write_register(device, 3, b"abcd")
    assert [call[:2] for call in device.calls] == [
        ("read", 2), ("read", 4), ("read", 6), ("write", 2), ("write", 4), ("write", 6)
    ]  # fmt: skip
    assert device.registers[:8] == b"\0\1\2abcd\7"


@pytest.mark.parametrize(
    ("valid", "offset", "size"),
    [(AccessSizes(4, 4), 0, 1), (AccessSizes(1, 4), 0, 8), (AccessSizes(1, 4), 2, 4), (AccessSizes(2, 2), 1, 2)],
)
def test_access_that_is_not_accepted_reaches_no_callback(valid: AccessSizes, offset: int, size: int) -> None:  # A2 A5
    device = ByteDevice(SIZE, valid=valid)
    with pytest.raises(AccessError, match=f"{size} bytes cannot be read at once") as caught:
        read_register(device, offset, size)
    assert (caught.value.address, caught.value.size) == (offset, size)
    with pytest.raises(AccessError, match=f"{size} bytes cannot be written at once"):
        write_register(device, offset, bytes(size))
    assert device.calls == []


def test_value_wider_than_asked_for_is_cut() -> None:
    class Wide(MemoryRegionOps):
        def read(self, offset: int, size: int) -> int:
            return -1

    assert read_register(Wide(), 0, 4) == b"\xff" * 4


def test_device_without_callbacks_refuses_all() -> None:  # A5
    with pytest.raises(AccessError, match="nothing can be read here: 4 bytes at 0x8"):
        read_register(MemoryRegionOps(), 8, 4)
    with pytest.raises(AccessError, match="nothing can be written here: 4 bytes at 0x8"):
        write_register(MemoryRegionOps(), 8, bytes(4))


@given(access=accesses, implemented=access_sizes, byte_order=byte_orders, content=st.randoms(use_true_random=False))
def test_any_access_moves_the_bytes_that_it_names_and_no_others(
    access: tuple[int, int], implemented: AccessSizes, byte_order: ByteOrder, content: random.Random
) -> None:  # A3 A4
    offset, size = access
    valid = AccessSizes(1, 8, unaligned=True)
    device = ByteDevice(SIZE, valid=valid, implemented=implemented, byte_order=byte_order)
    before = bytes(content.randbytes(SIZE))
    device.registers[:] = before

    assert read_register(device, offset, size) == before[offset : offset + size]

    data = bytes(content.randbytes(size))
    write_register(device, offset, data)
    assert device.registers == before[:offset] + data + before[offset + size :]
