"""How a migration may end, as `handover_model` sees it: every end has a name here."""

from enum import Enum

from support.handover_world import Program, World

from dirtylog.migration.custody import Custody


class Outcome(Enum):
    """Who has the guest once nothing moves any more."""

    STAYED = "it runs on at the source, and never ran anywhere else"
    MOVED = "it runs at the destination; the source, if there is one, knows"
    MOVED_UNTOLD = (
        "it runs at the destination; the source knows that it may, or that it lacks nothing but the last answer"
    )
    WAITS = "it runs at the destination and lacks memory; both sides wait for another connection"
    STRANDED = "it runs at the destination and lacks memory that was lost with the source"
    TAKEN_BACK = "it runs at the source, which has seen the destination end, unaware that it had begun to run there"
    IN_DOUBT = (
        "it stands still at the source, whose operator is told to look at the destination, where it never will run"
    )
    IN_DOUBT_PAUSED = "the same, and the source waits for another connection to a destination that never comes"
    ABANDONED = "the destination was told to give it up while it lacked memory"
    DIED_WITH_SOURCE = "the source died and had not let go, or was not heard"
    DIED_WITH_DESTINATION = "the destination died and had said that it has it"
    BOTH_DIED = "there is no process that could run it"


def outcome(world: World) -> Outcome | None:
    """How it has ended; None if somebody waits for what never comes."""
    source, destination = world.source, world.destination
    if not {source.program, destination.program} <= {Program.PAUSED, Program.ENDED}:
        return None
    if destination.runs:
        return _moved(world)
    if source.runs:
        return Outcome.TAKEN_BACK if destination.ran else Outcome.STAYED
    if destination.alive and destination.custody is Custody.MINE:
        return Outcome.ABANDONED
    if not source.alive:
        return Outcome.DIED_WITH_SOURCE if destination.alive else Outcome.BOTH_DIED
    if source.custody is Custody.DOUBTFUL:
        return Outcome.IN_DOUBT_PAUSED if source.program is Program.PAUSED else Outcome.IN_DOUBT
    return None if destination.alive else Outcome.DIED_WITH_DESTINATION


def _moved(world: World) -> Outcome:
    source = world.source
    if world.destination.owes:
        return Outcome.WAITS if source.alive else Outcome.STRANDED
    knows = source.custody is Custody.THEIRS and source.program is Program.ENDED
    return Outcome.MOVED if knows or not source.alive else Outcome.MOVED_UNTOLD
