"""The QMP commands with which others watch a machine's memory. QEMU has none of them; ``watch`` has their results."""

import json
from typing import Final

from dirtylog.control.controller import Controller
from dirtylog.control.qmp import CommandRegistry, NoArguments, Scope
from dirtylog.control.qmp.client import MAX_MESSAGE
from dirtylog.control.watch import SAMPLE, START, STOP, SampleInfo, WatchedBlock, WatchInfo, WrittenBlock
from dirtylog.display import Watcher, pack, packed_bound
from dirtylog.errors import UsageError
from dirtylog.memory import PageBitmap
from dirtylog.units import PAGE_SIZE, format_size

_ROOM: Final = 1024
"""What a reply takes besides its bitmaps and names, and again for each block, at most."""


class WatchCommands:
    """x-watch-start, x-watch-sample, x-watch-stop: a watch for each session that wants one.

    It ends with the session at the latest, so a client that is killed leaves no logging on.
    """

    def __init__(self, controller: Controller) -> None:
        self._machine = controller.machine
        self._sampler = controller.sampler
        self._watchers: dict[Scope, Watcher | None] = {}

    def register(self, registry: CommandRegistry) -> None:
        """Add them all to a registry."""
        registry.add_scoped(START, NoArguments, self._start)
        registry.add_scoped(SAMPLE, NoArguments, self._sample)
        registry.add_scoped(STOP, NoArguments, self._stop)

    def _start(self, _: NoArguments, scope: Scope) -> WatchInfo:
        if self._watchers.get(scope) is not None:
            raise UsageError("this session has a watch already", remedy=f"end it with {STOP}, or use another session")
        blocks = {block.name: block.pages for block in self._machine.memory.blocks.values()}
        _check_size(blocks)
        watcher = self._sampler.watch()
        if scope not in self._watchers:
            scope.callback(self._end_session, scope)
        self._watchers[scope] = watcher
        stored = {block.name: block.stored for block in self._machine.memory.blocks.values()}
        return WatchInfo(
            PAGE_SIZE,
            tuple(WatchedBlock(name, pages * PAGE_SIZE, pages, stored[name]) for name, pages in watcher.blocks.items()),
        )

    def _sample(self, _: NoArguments, scope: Scope) -> SampleInfo:
        sample = self._watcher(scope).sample()
        blocks = tuple(_describe(name, bitmap) for name, bitmap in sample.written.items())
        return SampleInfo(sample.time, sample.seconds, self._machine.state.value, blocks)

    def _stop(self, _: NoArguments, scope: Scope) -> None:
        watcher = self._watcher(scope)
        self._watchers[scope] = None
        watcher.close()

    def _watcher(self, scope: Scope) -> Watcher:
        watcher = self._watchers.get(scope)
        if watcher is None:
            raise UsageError("this session has no watch", remedy=f"begin one with {START}")
        return watcher

    def _end_session(self, scope: Scope) -> None:
        watcher = self._watchers.pop(scope)
        if watcher is not None:
            watcher.close()


def _check_size(blocks: dict[str, int]) -> None:
    """Refuse memory of which a sample might not fit into a message."""
    bitmaps = sum(packed_bound(pages) for pages in blocks.values())
    names = sum(len(json.dumps(name)) + _ROOM for name in blocks)
    if bitmaps * 4 // 3 + names + _ROOM > MAX_MESSAGE:
        size = format_size(sum(blocks.values()) * PAGE_SIZE)
        raise UsageError(f"{size} of memory are too much to be watched over QMP", remedy="about 380 GiB are possible")


def _describe(name: str, bitmap: PageBitmap) -> WrittenBlock:
    return WrittenBlock(name, bitmap.pages * PAGE_SIZE, bitmap.pages, bitmap.count(), pack(bitmap))
