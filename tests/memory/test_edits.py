"""Random edits, seen by the oracle that asks at each address, and by listeners that follow what they are told."""

from contextlib import AbstractContextManager

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
from support.listeners import Follower
from support.oracles import Node, as_asked, ask_everywhere
from support.trees import make, narrow_places, narrow_sizes, places, priorities, sizes

from dirtylog.errors import UsageError
from dirtylog.memory import AddressSpace, FlatView, IOEventFD, Memory, TrackingReason
from dirtylog.units import PAGE_SIZE

MOST_REGIONS = 9
picks = st.integers(0, 1 << 10)
"""Chosen from a list that is known only later."""


class Edits(RuleBasedStateMachine):
    """One memory with four address spaces, changed in every way that there is."""

    @initialize()
    def set_up(self) -> None:
        self.memory = Memory()
        root = Node(self.memory.container("root"), 1 << 64)
        whole = Node(self.memory.alias("whole", root.region, 0, 1 << 64), 1 << 64, root)
        only = Node(self.memory.container("only"), 1 << 64)
        cpu = Node(self.memory.alias("cpu", root.region, 0, 1 << 64), 1 << 64, root)
        part = Node(self.memory.alias("part", root.region, PAGE_SIZE, 4 * PAGE_SIZE), 4 * PAGE_SIZE, root, PAGE_SIZE)
        only.region.add(cpu.region, 0)
        only.children.append((cpu, 0, 0))
        self.nodes = [root]
        self.mapped: dict[Node, Node] = {}
        self.spaces: dict[AddressSpace, Node] = {
            self.memory.address_space(node.region.name, node.region): node for node in (root, whole, only, part)
        }
        self.followers: list[tuple[Follower, AddressSpace]] = []
        self.listener_comes(0, 0)
        self.open: list[tuple[AbstractContextManager[None], dict[AddressSpace, FlatView]]] = []
        self.displays: list[Node] = []
        self.eventfds: list[tuple[Node, IOEventFD]] = []
        self.code_client = False

    def _pick(self, pick: int) -> Node:
        return self.nodes[pick % len(self.nodes)]

    @precondition(lambda self: len(self.nodes) < MOST_REGIONS)
    @rule(data=st.data(), wide=st.booleans(), parent=picks, priority=priorities)
    def region_is_made_and_mapped(self, data: st.DataObject, wide: bool, parent: int, priority: int) -> None:
        node = make(self.memory, self.nodes, data, wide=wide)
        self.nodes.append(node)
        self._map(node, self._pick(parent), data.draw(places if wide else narrow_places), priority)

    @rule(child=picks, parent=picks, address=narrow_places, priority=priorities)
    def region_is_mapped(self, child: int, parent: int, address: int, priority: int) -> None:
        self._map(self._pick(child), self._pick(parent), address, priority)

    def _map(self, node: Node, parent: Node, address: int, priority: int) -> None:
        refusal = (
            "is an alias" if parent.target is not None
            else "mapped in" if node in self.mapped
            else "would contain itself" if node.shows(parent)
            else None
        )  # fmt: skip
        if refusal is not None:  # V7
            with pytest.raises(UsageError, match=refusal):
                parent.region.add(node.region, address, priority=priority)
            return
        parent.children.append((node, address, priority))
        self.mapped[node] = parent
        parent.region.add(node.region, address, priority=priority)

    @rule(pick=picks)
    def region_is_unmapped(self, pick: int) -> None:
        node = self._pick(pick)
        if node in self.mapped:
            parent = self.mapped.pop(node)
            parent.children = [entry for entry in parent.children if entry[0] is not node]
            parent.region.remove(node.region)

    @rule(pick=picks, address=places, priority=st.none() | priorities)
    def region_is_moved(self, pick: int, address: int, priority: int | None) -> None:
        node = self._pick(pick)
        if node not in self.mapped:
            with pytest.raises(UsageError, match="not mapped anywhere"):
                node.region.move(address)
            return
        parent = self.mapped[node]
        before = next(entry for entry in parent.children if entry[0] is node)
        after = (node, address, before[2] if priority is None else priority)
        if after != before:
            parent.children.remove(before)
            parent.children.append(after)
        node.region.move(address, priority=priority)

    @rule(pick=picks)
    def region_is_shown_or_hidden(self, pick: int) -> None:
        node = self._pick(pick)
        node.enabled = not node.enabled
        node.region.set_enabled(node.enabled)

    @rule(pick=picks)
    def region_is_protected_or_not(self, pick: int) -> None:
        node = self._pick(pick)
        node.readonly = not node.readonly
        node.region.set_readonly(node.readonly)

    @rule(pick=picks, size=sizes | narrow_sizes)
    def region_is_resized(self, pick: int, size: int) -> None:
        node = self._pick(pick)
        if node.has_memory:
            with pytest.raises(UsageError, match="size of its block"):
                node.region.set_size(size)
            return
        node.size = size
        node.region.set_size(size)

    @rule(pick=picks, offset=places)
    def alias_shows_another_part(self, pick: int, offset: int) -> None:
        node = self._pick(pick)
        if node.target is None:
            with pytest.raises(UsageError, match="not an alias"):
                node.region.set_target_offset(offset)
            return
        node.offset = offset
        node.region.set_target_offset(offset)

    @rule(pick=picks)
    def rom_device_is_trapped_or_not(self, pick: int) -> None:
        node = self._pick(pick)
        if node.region.kind != "rom-device":
            with pytest.raises(UsageError, match="not a ROM device"):
                node.region.set_trapped(True)
            return
        node.trapped = not node.trapped
        node.region.set_trapped(node.trapped)

    @rule(pick=picks)
    def display_starts(self, pick: int) -> None:
        node = self._pick(pick)
        if node.has_memory:
            self.displays.append(node)
            node.region.start_logging_display()

    @precondition(lambda self: self.displays)
    @rule(pick=picks)
    def display_stops(self, pick: int) -> None:
        self.displays.pop(pick % len(self.displays)).region.stop_logging_display()

    @rule(reason=st.sampled_from(list(TrackingReason)))
    def global_logging_starts_or_stops(self, reason: TrackingReason) -> None:  # T14
        change = self.memory.stop_logging if reason & self.memory.tracking else self.memory.start_logging
        if self.open:
            with pytest.raises(UsageError, match="inside a transaction"):
                change(reason)
        else:
            change(reason)

    @rule()
    def code_client_comes_or_goes(self) -> None:
        self.code_client = not self.code_client
        self.memory.set_code_client(self.code_client)

    @rule(
        pick=picks,
        address=st.integers(0, 7),
        size=st.sampled_from([0, 1, 8]),
        match=st.booleans(),
        fd=st.integers(3, 5),
    )
    def eventfd_comes(self, pick: int, address: int, size: int, match: bool, fd: int) -> None:
        answering = [node for node in self.nodes if node.answers] or self.nodes
        node = answering[pick % len(answering)]
        eventfd = IOEventFD(address * PAGE_SIZE // 2, size, match and size > 0, 0, fd)
        if eventfd.address + max(size, 1) > node.size:
            with pytest.raises(UsageError, match="an eventfd for"):
                node.region.add_eventfd(eventfd)
        elif (node, eventfd) not in self.eventfds:
            self.eventfds.append((node, eventfd))
            node.region.add_eventfd(eventfd)

    @precondition(lambda self: self.eventfds)
    @rule(pick=picks)
    def eventfd_goes(self, pick: int) -> None:
        node, eventfd = self.eventfds.pop(pick % len(self.eventfds))
        node.region.remove_eventfd(eventfd)

    @rule(pick=picks, offset=narrow_places, size=narrow_sizes)
    def writes_are_coalesced(self, pick: int, offset: int, size: int) -> None:
        node = self._pick(pick)
        if offset + size <= node.size:
            node.region.add_coalescing(offset, size)

    @rule(pick=picks)
    def writes_are_coalesced_no_longer(self, pick: int) -> None:
        self._pick(pick).region.clear_coalescing()

    @precondition(lambda self: len(self.followers) < 4)
    @rule(pick=picks, priority=st.integers(0, 2))
    def listener_comes(self, pick: int, priority: int) -> None:
        follower, space = Follower(priority), list(self.spaces)[pick % len(self.spaces)]
        self.followers.append((follower, space))
        self.memory.register(follower, space)

    @precondition(lambda self: len(self.followers) > 1)
    @rule(pick=picks)
    def listener_goes(self, pick: int) -> None:
        follower, _ = self.followers.pop(pick % len(self.followers))
        self.memory.unregister(follower)
        follower.check_gone()

    @precondition(lambda self: len(self.open) < 3)
    @rule()
    def transaction_begins(self) -> None:
        transaction = self.memory.transaction()
        transaction.__enter__()
        self.open.append((transaction, {space: space.view for space in self.spaces}))

    @precondition(lambda self: self.open)
    @rule()
    def transaction_ends(self) -> None:
        transaction, _ = self.open.pop()
        transaction.__exit__(None, None, None)

    @invariant()
    def views_and_listeners_are_right_outside_transactions(self) -> None:
        if self.open:  # T1
            _, before = self.open[0]
            assert all(space.view is view for space, view in before.items())
            return
        for space, node in self.spaces.items():
            assert as_asked(space.view) == ask_everywhere(node)
            assert all(flat.logging == flat.region.logging for flat in space.view.ranges)
        for follower, space in self.followers:
            follower.check(space)

    @invariant()
    def address_spaces_that_show_the_same_share_a_view(self) -> None:  # V6
        root, whole, only, _ = self.spaces
        assert root.view is whole.view
        assert root.view is only.view

    def teardown(self) -> None:
        if not hasattr(self, "memory"):
            return
        try:
            while self.open:
                self.transaction_ends()
            for space in self.spaces:
                self.memory.remove_address_space(space)
            for follower, _ in self.followers:
                follower.check_gone()
        finally:
            self.memory.close()


def test_views_and_listeners_follow_any_edits() -> None:  # T1 T3 T4 T5 T6 V1 V2 V3 V4 V5 V6 E1 E3 E5 E6
    run_state_machine_as_test(Edits, settings=settings(max_examples=150, stateful_step_count=40))
