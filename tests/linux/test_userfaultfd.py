import ctypes
import mmap
import os
import platform
from collections.abc import Iterator
from contextlib import closing

import pytest
from support.forks import in_child, refused_with
from support.mappings import address_of
from support.require import require

from dirtylog.errors import AlreadyWatchedError, ClosedError, ForkedError, HostError, KernelError, UntrackableError
from dirtylog.linux import ioctl, userfaultfd
from dirtylog.linux.mapping import MemfdMapping
from dirtylog.linux.userfaultfd import Access, Feature, RegisterMode, Userfaultfd
from dirtylog.units import PAGE_SIZE


@pytest.fixture
def watch() -> Iterator[Userfaultfd]:
    try:
        opened = Userfaultfd()
    except HostError as error:
        require("userfaultfd", False, str(error))
        raise
    with opened:
        yield opened


def refuse(*calls: int) -> object:
    """A stand-in for the system call that refuses the given flags."""
    real = userfaultfd._call

    def call(flags: int) -> int:
        if flags in calls:
            raise ioctl.kernel_error("userfaultfd", PermissionError(1, "Operation not permitted"))
        return real(flags)

    return call


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (userfaultfd.DEVICE_NEW, 0xAA00),
        (userfaultfd.UFFDIO_API, 0xC018AA3F),
        (userfaultfd.UFFDIO_REGISTER, 0xC020AA00),
        (userfaultfd.UFFDIO_UNREGISTER, 0x8010AA01),
    ],
)
def test_requests_have_the_numbers_of_the_kernel_headers(request_: ioctl.Request, code: int) -> None:
    assert request_.code == code


@pytest.mark.parametrize(
    ("structure", "size"),
    [(userfaultfd.ApiArgument, 24), (userfaultfd.RangeArgument, 16), (userfaultfd.RegisterArgument, 32)],
)
def test_structures_have_the_kernels_sizes(structure: type[ctypes.Structure], size: int) -> None:
    assert ctypes.sizeof(structure) == size


def test_handshake_tells_the_features(watch: Userfaultfd) -> None:
    assert watch.features & Feature.MISSING_SHMEM


def test_feature_that_no_kernel_has_is_refused_by_name(watch: Userfaultfd) -> None:
    with pytest.raises(HostError, match="does not offer") as caught:
        Userfaultfd(Feature(1 << 63))
    assert isinstance(caught.value.__cause__, KernelError)


def test_memory_registers_and_unregisters(watch: Userfaultfd) -> None:
    require("uffd-wp-shmem", Feature.WP_HUGETLBFS_SHMEM in watch.features, "no write protection of shared memory")
    with closing(MemfdMapping("test", PAGE_SIZE)) as memory, Userfaultfd(Feature.WP_HUGETLBFS_SHMEM) as wanted:
        wanted.register(memory.address, PAGE_SIZE, RegisterMode.WP)
        wanted.unregister(memory.address, PAGE_SIZE)


def test_part_of_a_page_is_refused(watch: Userfaultfd) -> None:
    with closing(MemfdMapping("test", PAGE_SIZE)) as memory, pytest.raises(UntrackableError, match="is not all"):
        watch.register(memory.address + 1, PAGE_SIZE, RegisterMode.MISSING)


def test_memory_of_another_userfaultfd_is_refused(watch: Userfaultfd) -> None:
    with closing(MemfdMapping("test", PAGE_SIZE)) as memory, Userfaultfd() as other:
        other.register(memory.address, PAGE_SIZE, RegisterMode.MISSING)
        with pytest.raises(AlreadyWatchedError, match="watched by another"):
            watch.register(memory.address, PAGE_SIZE, RegisterMode.MISSING)


def test_what_was_unmapped_meanwhile_unregisters_all_the_same(watch: Userfaultfd) -> None:
    pages = mmap.mmap(-1, PAGE_SIZE)
    address = address_of(pages)
    watch.register(address, PAGE_SIZE, RegisterMode.MISSING)
    pages.close()
    watch.unregister(address, PAGE_SIZE)


def test_userfaultfd_of_a_parent_is_refused(watch: Userfaultfd) -> None:
    assert in_child(lambda: refused_with(ForkedError, lambda: watch.unregister(0, PAGE_SIZE)))


def test_descriptor_is_not_inherited(watch: Userfaultfd) -> None:
    assert not os.get_inheritable(watch.fd)


def test_closed_is_refused_and_closes_again(watch: Userfaultfd) -> None:
    watch.close()
    watch.close()
    with pytest.raises(ClosedError):
        watch.register(0, PAGE_SIZE, RegisterMode.WP)


def test_user_mode_is_the_last_way(watch: Userfaultfd, monkeypatch: pytest.MonkeyPatch) -> None:
    require("userfaultfd", os.uname().machine in userfaultfd._CALL_NUMBERS, "no number for the system call")
    monkeypatch.setattr(userfaultfd, "_call", refuse(0))
    with Userfaultfd(device="/nonexistent") as opened:
        assert opened.access is Access.USER_MODE


def test_device_is_the_second_way(watch: Userfaultfd, monkeypatch: pytest.MonkeyPatch) -> None:
    device = userfaultfd.USERFAULTFD_DEVICE
    require("userfaultfd-device", os.access(device, os.R_OK | os.W_OK), f"{device} cannot be opened")
    monkeypatch.setattr(userfaultfd, "_call", refuse(0))
    with Userfaultfd() as opened:
        assert opened.access is Access.DEVICE


def test_no_way_at_all_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userfaultfd, "_call", refuse(0, userfaultfd._USER_MODE_ONLY))
    with pytest.raises(HostError, match="no userfaultfd is to be had") as caught:
        Userfaultfd(device="/nonexistent")
    assert "vm.unprivileged_userfaultfd=1" in (caught.value.remedy or "")


def test_unknown_processor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with pytest.raises(HostError, match="not known for vax"):
        Userfaultfd()
