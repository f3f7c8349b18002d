"""How long a guest that runs before its memory has arrived waits for it."""

import threading
import time
from array import array
from collections.abc import Sequence
from typing import Final

_MOST_LATENCIES: Final = 1 << 20
"""8 MiB of them; a guest of 4 GiB has no more pages."""


class Blocktime:
    """Who waits for which page, and for how long. Times in seconds. May be used from any thread.

    Args:
        vcpus: the thread of each vCPU.

    Attributes:
        requests: pages that somebody waited for.
        latencies: how long, from when the fault was read until the page was there; the first 2**20 of them.
        blocked: for how long all vCPUs waited at the same time.
        vcpu_blocked: for how long each vCPU waited.
    """

    def __init__(self, vcpus: Sequence[int]) -> None:
        self.requests = 0
        self.latencies = array("d")
        self.blocked = 0.0
        self.vcpu_blocked = [0.0] * len(vcpus)
        self._index = {thread: index for index, thread in enumerate(vcpus)}
        self._lock = threading.Lock()
        self._waiting: dict[tuple[int, int], list[tuple[float, int | None]]] = {}
        self._waits = [0] * len(vcpus)
        """Pages that each waits for: two for a moment where it goes on to the next before the first is noted."""
        self._since = [0.0] * len(vcpus)
        self._blocked_now: set[int] = set()
        self._all_blocked_since = 0.0

    def begin(self, block: int, page: int, thread: int, since: float) -> None:
        """Somebody waits for a page since some `time.monotonic`. Who is interrupted in it may say so again."""
        vcpu = self._index.get(thread)
        with self._lock:
            waiting = self._waiting.setdefault((block, page), [])
            if waiting and vcpu is not None and any(vcpu == other for _, other in waiting):
                return
            self.requests += 1
            waiting.append((since, vcpu))
            if vcpu is not None:
                self._block(vcpu, since)

    def end(self, block: int, page: int) -> None:
        """The page is there; nothing to do if nobody waits for it."""
        if (block, page) not in self._waiting:
            return
        now = time.monotonic()
        with self._lock:
            for began, vcpu in self._waiting.pop((block, page), ()):
                if len(self.latencies) < _MOST_LATENCIES:
                    self.latencies.append(now - began)
                if vcpu is not None:
                    self._release(vcpu, now)

    def _block(self, vcpu: int, now: float) -> None:
        self._waits[vcpu] += 1
        if self._waits[vcpu] > 1:
            return
        self._since[vcpu] = now
        self._blocked_now.add(vcpu)
        if len(self._blocked_now) == len(self._index):
            self._all_blocked_since = now

    def _release(self, vcpu: int, now: float) -> None:
        self._waits[vcpu] -= 1
        if self._waits[vcpu]:
            return
        self.vcpu_blocked[vcpu] += now - self._since[vcpu]
        if len(self._blocked_now) == len(self._index):
            self.blocked += now - self._all_blocked_since
        self._blocked_now.discard(vcpu)

    @property
    def mean(self) -> float:
        """How long those who waited did on average; 0 if nobody did."""
        with self._lock:
            return sum(self.latencies) / len(self.latencies) if self.latencies else 0.0

    def quantile(self, share: float) -> float:
        """How long that share of those who waited did at most; 0 if nobody waited."""
        with self._lock:
            latencies = sorted(self.latencies)
        return latencies[min(len(latencies) - 1, int(share * len(latencies)))] if latencies else 0.0
