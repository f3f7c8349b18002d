"""Each kind of fault at each kind of place of each message of a migration, and a part of that."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from support.places import PAYLOADS, PREAMBLE_NAME, Boundary, Fault, Place, boundaries

from dirtylog.migration.protocol import Role

_S, _D = Role.SOURCE, Role.DESTINATION

# Way, sender, number of the connection, messages; those after a slash count once that message was said there.
_SAID: Final = (
    ("precopy", _S, 0, f"{PREAMBLE_NAME} Hello Pages ZeroPages PassEnd Digests State Handover"),
    ("precopy", _D, 0, f"{PREAMBLE_NAME} Welcome PassDone Ready Taken"),
    ("encoded", _S, 0, "EncodedPages"),
    ("channels", _S, 1, f"{PREAMBLE_NAME} Join Pages ZeroPages PassEnd"),
    ("channels", _D, 1, f"{PREAMBLE_NAME} Joined PassDone"),
    ("shared", _S, 0, "Shared"),
    ("shared", _D, 0, "PassDone"),
    ("refused", _D, 0, "Failed"),
    ("postcopy", _S, 0, "Owed State Handover Taken/Pages Taken/ZeroPages Taken/PassEnd"),
    ("postcopy", _D, 0, "Ready Taken Taken/PassDone"),
    ("postcopy", _S, 1, "Join Page"),
    ("postcopy", _D, 1, "Joined Request"),
    ("recovery", _S, 2, f"{PREAMBLE_NAME} Resume"),
    ("recovery", _D, 2, f"{PREAMBLE_NAME} Lacking Resumed"),
    ("recovery", _S, 3, "Join"),
    ("recovery", _D, 3, "Joined"),
)
"""``support.faults.WAYS`` says what the ways are."""

ON_CONNECTIONS: Final = (Fault.CLOSE, Fault.RESET, Fault.STALL, Fault.SHORT, Fault.TWICE)
EVERYTHING: Final = os.environ.get("DIRTYLOG_FAULTS") == "all"
"""Whether to run what takes many minutes."""


@dataclass(frozen=True)
class Case:
    """A fault at a place, in a way to migrate."""

    way: str
    place: Place
    fault: Fault

    def __str__(self) -> str:
        place = self.place
        link = f"-link{place.link}" if place.link else ""
        return f"{self.way}{link}-{place.sender.value}-{place.message}-{place.boundary.value}-{self.fault.value}"


def cases(faults: Sequence[Fault]) -> Iterator[Case]:
    """All of them, message by message and then fault by fault."""
    for way, sender, link, messages in _SAID:
        for entry in messages.split():
            since, _, message = entry.rpartition("/")
            for fault in faults:
                for boundary in boundaries(message):
                    place = Place(sender, message, boundary, link, since)
                    if not (fault is Fault.TWICE and _is_race(place)):
                        yield Case(way, place, fault)


def _is_race(place: Place) -> bool:
    """Whether the destination may hear twice what a connection begins with, and nobody can say which is the first."""
    if place.sender is _D:
        return place.message == PREAMBLE_NAME
    return place.message in ("Hello", "Join", "Resume") and place.boundary is Boundary.AFTER


def _message(case: Case) -> tuple[str, Role, str]:
    return case.way, case.place.sender, case.place.message


def each_fault(faults: Sequence[Fault]) -> Iterator[Case]:
    """For each message one case of each fault, going round its places; and one of each place, if it has a payload."""
    for index, (_, group) in enumerate(groupby(cases(faults), _message)):
        some = list(group)
        places = list(dict.fromkeys(case.place for case in some))
        turns = len(places) if some[0].place.message in PAYLOADS else len(faults)
        for turn in range(turns):
            of_fault = [case for case in some if case.fault is faults[turn % len(faults)]]
            wanted = places[(2 * index + turn) % len(places)]
            if of_fault:
                yield next((case for case in of_fault if case.place == wanted), of_fault[0])


def one_fault(faults: Sequence[Fault], first: int) -> Iterator[Case]:
    """For each message one of those, going round the faults."""
    for index, (_, group) in enumerate(groupby(each_fault(faults), _message)):
        some = list(group)
        yield some[(first + index) % len(some)]
