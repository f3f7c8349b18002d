"""Random schedules of all who use one dirty log: no write is lost."""

from collections.abc import Callable
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.kvm import KVMWorld
from support.model_tracker import ModelWorld
from support.worlds import World

from dirtylog.linux.kvm import KVM
from dirtylog.memory import (
    ClearChunks,
    Client,
    MemoryRegion,
    PageBitmap,
    TrackingReason,
)
from dirtylog.trackers import KVMLogMode
from dirtylog.units import MIB, PAGE_SIZE

PAGES = 200
WINDOWS = [(0, 130, 0), (130, 70, 8 * MIB), (61, 80, 16 * MIB)]
"""Parts of the RAM that come and go, as first page, pages and address. They touch and overlap amid words."""
PLACES = [0, 8 * MIB, 16 * MIB, 16 * MIB + 64 * PAGE_SIZE, 24 * MIB]
"""Where windows are moved to; two may overlap there."""
LOOKERS = [Client.DISPLAY, Client.CODE]
"""Clients that have a copy of the contents and ask what changed."""

WRITTEN = [0, 61, 64, 100, 129, 130, 140, 199]
"""The only pages that are written: few, so that what their users do meets."""
EDGES = [0, 60, 64, 65, 128, 130, 199, 200]

windows = st.integers(0, len(WINDOWS) - 1)
edits = st.tuples(
    windows,
    st.sampled_from(["map", "move", "hide", "protect", "resize", "show another part", "cover"]),
    st.sampled_from(EDGES),
    st.sampled_from(PLACES),
)
lookers = st.sampled_from(LOOKERS)
page_lists = st.lists(st.sampled_from(WRITTEN), min_size=1, max_size=4)
ranges = st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)).filter(lambda pair: pair[0] < pair[1])
"""First page, and the page after the last."""


class DirtyLogUsers(RuleBasedStateMachine):
    """A guest writes; a display, a translator of code and a migration use one dirty log in any order.

    Each keeps a copy that has to catch up: one that differs after its user did all that the rules ask for is a lost
    write. Meanwhile the memory moves about.
    """

    world: World
    ram: MemoryRegion
    aliases: list[MemoryRegion]

    def make_world(self) -> World:
        raise NotImplementedError

    @initialize()
    def set_up(self) -> None:
        self.world = self.make_world()
        self.ram = self.world.ram
        self.aliases = [
            self.world.memory.alias(f"window{n}", self.ram, first * PAGE_SIZE, count * PAGE_SIZE)
            for n, (first, count, _) in enumerate(WINDOWS)
        ]
        for alias, (_, _, address) in zip(self.aliases, WINDOWS, strict=True):
            self.world.root.add(alias, address)
        self.cover = self.world.memory.ram("cover", 10 * PAGE_SIZE)
        self.copies: dict[Client, npt.NDArray[np.uint8]] = {}
        self.destination: npt.NDArray[np.uint8] | None = None
        self.pending = PageBitmap(PAGES)
        self.chunks = ClearChunks(PAGES, 1)
        for client in Client:  # what is born dirty hides what is lost
            self.ram.test_and_clear_dirty(0, self.ram.size, client)

    @property
    def contents(self) -> npt.NDArray[np.uint8]:
        """The first byte of each page, which is all that anybody writes."""
        assert self.ram.block is not None
        return self.ram.block.array[::PAGE_SIZE].copy()

    @rule(wanted=page_lists)
    def guest_writes(self, wanted: list[int]) -> None:
        for page in wanted:
            self.world.write(self._addresses(page)[:1])

    @rule(wanted=page_lists)
    def guest_writes_through_every_window(self, wanted: list[int]) -> None:
        for page in wanted:
            self.world.write(self._addresses(page))

    @rule(page=st.sampled_from(WRITTEN))
    def host_writes(self, page: int) -> None:  # D12
        for address in self._addresses(page):
            self.world.system.write(address, bytes(((int(self.contents[page]) + 1) % 256,)))

    def _addresses(self, page: int) -> list[int]:
        """Where a page can be written."""
        return [
            flat.start + page * PAGE_SIZE - flat.offset
            for flat in self.world.system.view.ranges
            if flat.region is self.ram and not flat.readonly and 0 <= page * PAGE_SIZE - flat.offset < flat.size
        ]

    @rule(changes=st.lists(edits, min_size=1, max_size=3))
    def memory_is_changed(self, changes: list[tuple[int, str, int, int]]) -> None:  # D6
        with self.world.memory.transaction():
            for window, change, page, place in changes:
                self._change(self.aliases[window], change, page, place)

    def _change(self, alias: MemoryRegion, change: str, page: int, place: int) -> None:
        root = self.world.root
        if change == "map" and alias.container is not None:
            root.remove(alias)
        elif change in ("map", "move") and alias.container is None:
            root.add(alias, place)
        elif change == "move":
            alias.move(place)
        elif change == "hide":
            alias.set_enabled(not alias.enabled)
        elif change == "protect":
            alias.set_readonly(not alias.readonly)
        elif change == "resize":
            alias.set_size(max(page, 1) * PAGE_SIZE)
        elif change == "show another part":
            alias.set_target_offset(page * PAGE_SIZE)
        elif self.cover.container is not None:
            root.remove(self.cover)
        else:
            root.add(self.cover, place + page * PAGE_SIZE, priority=1)

    @rule()
    def listener_is_replaced(self) -> None:  # D6
        self.world.memory.unregister(self.world.listener)
        self.world.memory.register(self.world.listener, self.world.system)

    @rule()
    def sync(self) -> None:
        self.world.memory.sync_dirty_log()

    @rule(client=lookers)
    def looker_starts_or_stops(self, client: Client) -> None:
        starts = client not in self.copies
        if client is Client.CODE:
            self.world.memory.set_code_client(starts)
        elif starts:
            self.ram.start_logging_display()
        else:
            self.ram.stop_logging_display()
        if starts:
            self.copies[client] = self.contents
        else:
            del self.copies[client]

    @rule(client=lookers, wanted=ranges, sync=st.booleans())
    def looker_refreshes(self, client: Client, wanted: tuple[int, int], sync: bool) -> None:
        if client not in self.copies:
            return
        first, end = wanted
        offset, size = first * PAGE_SIZE, (end - first) * PAGE_SIZE
        if sync:
            snapshot = self.ram.snapshot_and_clear_dirty(offset, size, client)
            stale = [page for page in range(first, end) if snapshot.is_dirty(page * PAGE_SIZE, 1)]
        else:
            stale = list(range(first, end))
            if not self.ram.test_and_clear_dirty(offset, size, client):
                stale = []
        self.copies[client][stale] = self.contents[stale]

    @rule(first_pass=st.booleans())
    def migration_starts_or_stops(self, first_pass: bool) -> None:
        if self.destination is None:
            self.world.memory.start_logging(TrackingReason.MIGRATION)
            self.destination = np.zeros(PAGES, np.uint8)
            self.pending.set()
            self.chunks = ClearChunks(PAGES, 1)
            if first_pass:
                self._send(0, PAGES, [], [], fails=False)
        else:
            self.world.memory.stop_logging(TrackingReason.MIGRATION)
            self.destination = None

    @precondition(lambda self: self.destination is not None)
    @rule(chunked=st.booleans(), sync=st.booleans())
    def migration_harvests(self, chunked: bool, sync: bool) -> None:
        if sync:
            self.world.memory.sync_dirty_log()
        self.ram.harvest_dirty(self.pending, self.chunks if chunked else None)

    @precondition(lambda self: self.destination is not None)
    @rule(wanted=ranges, before=page_lists, after=page_lists, fails=st.booleans())
    def migration_sends(self, wanted: tuple[int, int], before: list[int], after: list[int], fails: bool) -> None:
        # D3 D7: clear, then read, then send, while the guest goes on writing.
        self._send(wanted[0], wanted[1] - wanted[0], before, after, fails=fails)

    @precondition(lambda self: self.destination is not None)
    @rule()
    def migration_catches_up(self) -> None:  # D1
        assert self.destination is not None
        self.world.memory.sync_dirty_log()
        self.ram.harvest_dirty(self.pending, self.chunks)
        self._send(0, PAGES, [], [], fails=False)
        assert self.destination.tolist() == self.contents.tolist()

    @rule()
    def lookers_catch_up(self) -> None:  # D1
        for client, copy in self.copies.items():
            self.looker_refreshes(client, (0, PAGES), True)
            assert copy.tolist() == self.contents.tolist()

    def _send(self, first: int, count: int, before: list[int], after: list[int], *, fails: bool) -> None:
        assert self.destination is not None
        for due, length in self.chunks.take(first, count):
            self.ram.clear_dirty_bitmap(due * PAGE_SIZE, length * PAGE_SIZE)
        sent = self.pending.indices(first, count)
        taken = self.pending.fetch_and_clear(first, count)
        self.guest_writes(before)
        read = self.contents[sent]
        self.guest_writes(after)
        if fails:
            self.pending.merge(taken, first, count)
        else:
            self.destination[sent] = read

    @invariant()
    def every_stale_page_is_known(self) -> None:  # D1
        if not isinstance(self.world, ModelWorld):
            return
        for page in WRITTEN:
            value = self.contents[page]
            noticed = self.world.notices(page)
            for client, copy in self.copies.items():
                assert copy[page] == value or noticed or self.ram.is_dirty(page * PAGE_SIZE, 1, client)
            if self.destination is not None and self.destination[page] != value:
                dirty = self.ram.is_dirty(page * PAGE_SIZE, 1, Client.MIGRATION)
                assert noticed or dirty or self.pending.test(page)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            if self.destination is not None:
                self.migration_catches_up()
            self.lookers_catch_up()
        finally:
            self.world.close()


@pytest.mark.parametrize("mode", KVMLogMode)
def test_no_write_is_lost_whoever_clears_when(mode: KVMLogMode) -> None:  # D1 D2 D4 D5 D9
    class OnTheModel(DirtyLogUsers):
        def make_world(self) -> World:
            return ModelWorld(mode, PAGES)

    run_state_machine_as_test(
        OnTheModel, settings=settings(deadline=None, max_examples=60, stateful_step_count=50, derandomize=True)
    )


@pytest.mark.parametrize("mode", KVMLogMode)
def test_no_write_is_lost_on_kvm_whoever_clears_when(kvm: KVM, mode: KVMLogMode) -> None:  # D1 D2 D4 D5 D9
    class OnKVM(DirtyLogUsers):
        def make_world(self) -> World:
            return KVMWorld(kvm, mode, PAGES)

    run_state_machine_as_test(
        OnKVM, settings=settings(deadline=None, max_examples=15, stateful_step_count=50, derandomize=True)
    )


Step = Callable[[DirtyLogUsers, Random], None]


def _coin(random: Random) -> bool:
    return random.random() < 0.5


def _pages(random: Random) -> list[int]:
    return random.choices(WRITTEN, k=random.randint(1, 4))


def _range(random: Random) -> tuple[int, int]:
    first, end = sorted(random.sample(EDGES, 2))
    return first, end


def _edit(random: Random) -> tuple[int, str, int, int]:
    change = random.choice(["map", "move", "hide", "protect", "resize", "show another part", "cover"])
    return random.randrange(len(WINDOWS)), change, random.choice(EDGES), random.choice(PLACES)


STEPS: list[tuple[float, Step]] = [
    (4, lambda users, random: users.guest_writes(_pages(random))),
    (2, lambda users, random: users.guest_writes_through_every_window(_pages(random))),
    (1, lambda users, random: users.host_writes(random.choice(WRITTEN))),
    (0.3, lambda users, random: users.memory_is_changed([_edit(random)])),
    (0.1, lambda users, random: users.listener_is_replaced()),
    (1, lambda users, random: users.sync()),
    (0.5, lambda users, random: users.looker_starts_or_stops(random.choice(LOOKERS))),
    (2, lambda users, random: users.looker_refreshes(random.choice(LOOKERS), _range(random), _coin(random))),
    (0.5, lambda users, random: users.migration_starts_or_stops(_coin(random))),
    (0.2, lambda users, random: users.lookers_catch_up()),
]
MIGRATION_STEPS: list[tuple[float, Step]] = [
    (2, lambda users, random: users.migration_harvests(_coin(random), _coin(random))),
    (2, lambda users, random: users.migration_sends(_range(random), _pages(random), _pages(random), _coin(random))),
    (0.2, lambda users, random: users.migration_catches_up()),
]


def walk(users: DirtyLogUsers, seed: int, steps: int) -> None:
    """Let the users do ``steps`` things at random; many more than Hypothesis would in the same time."""
    random = Random(seed)  # noqa: S311 - not for secrets
    users.set_up()
    try:
        for _ in range(steps):
            weights, actions = zip(*STEPS, *(MIGRATION_STEPS if users.destination is not None else ()), strict=True)
            random.choices(actions, weights)[0](users, random)
            users.every_stale_page_is_known()
    finally:
        users.teardown()


@pytest.mark.parametrize("mode", KVMLogMode)
def test_no_write_is_lost_on_long_walks(mode: KVMLogMode) -> None:  # D1 D2 D4 D5 D9
    class OnTheModel(DirtyLogUsers):
        def make_world(self) -> World:
            return ModelWorld(mode, PAGES)

    for seed in range(40):
        walk(OnTheModel(), seed, 250)


@pytest.mark.parametrize("mode", KVMLogMode)
def test_no_write_is_lost_on_long_walks_on_kvm(kvm: KVM, mode: KVMLogMode) -> None:  # D1 D2 D4 D5 D9
    class OnKVM(DirtyLogUsers):
        def make_world(self) -> World:
            return KVMWorld(kvm, mode, PAGES)

    for seed in range(8):
        walk(OnKVM(), seed, 200)
