"""A model of both sides of a migration, of the network between them, and of all that may befall them.

What may be said when is the protocol's own table, and whose the guest is are those of `custody`: here is only what the
tables leave to each side's program. The rest is left to chance: a side says anything that its table allows, so that
every order of what it may do is one that is looked at.

Left out: side channels, which never lead to the guest; contents; and time, as a timeout is a loss like any other.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from support.handover_world import Kind, Link, Program, Side, World

from dirtylog.migration.custody import DESTINATION, SOURCE, Custody, Event
from dirtylog.migration.messages import (
    Digests,
    Failed,
    Handover,
    Hello,
    Join,
    Owed,
    PassDone,
    Ready,
    Resume,
    Resumed,
    Shared,
    State,
    Taken,
)
from dirtylog.migration.protocol import SENDERS, TRANSITIONS, Role, Stage

Table = Mapping[tuple[Custody, Event], Custody]


class Fault(Enum):
    """What may happen at any moment, and need not."""

    CUT = "the connection is lost"
    SOURCE_DIES = "the source dies"
    DESTINATION_DIES = "the destination dies"
    CANCEL = "the source is told to cancel"
    ABORT = "the destination is told to give up"
    REFUSE = "the destination says Failed"
    RECOVER = "postcopy goes on over another connection"
    CONT = "the source's operator decides that the guest runs there"


Steps = Iterator[tuple[str, World]]


@dataclass(frozen=True)
class Rules:
    """What both sides keep to; other values are mistakes that a test is to find.

    Attributes:
        capacity: messages that can be under way in one direction.
        stops_first: whether the guest stands still when its state is saved.
        starts_after: whether it is started after ``Taken`` was said, not before.
        cancels: when cancelling is agreed to.
        refuses: when the destination says that it failed.
        proof: whether the source takes the destination for ended.
        cont: when the source's operator decides that the guest runs there.
    """

    source: Table = field(default_factory=lambda: SOURCE)
    destination: Table = field(default_factory=lambda: DESTINATION)
    transitions: Mapping[tuple[Stage, Kind], Stage] = field(default_factory=lambda: TRANSITIONS)
    senders: Mapping[Kind, frozenset[Role]] = field(default_factory=lambda: SENDERS)
    capacity: int = 2
    stops_first: bool = True
    starts_after: bool = True
    cancels: frozenset[Custody] = frozenset({Custody.MINE})
    refuses: frozenset[Custody] = frozenset({Custody.THEIRS})
    proof: Callable[[World], bool] = lambda world: world.one_host and not world.destination.alive
    cont: Callable[[Side], bool] = lambda side: not side.alive or side.custody is Custody.NEVER


class Model:
    """Steps from one world to the next. `progress` is what happens by itself, `faults` what may come in between."""

    def __init__(self, faults: frozenset[Fault], rules: Rules) -> None:
        self._allowed = faults
        self.rules = rules
        self._kinds = _representatives(rules)

    @staticmethod
    def initial(*, one_host: bool) -> World:
        return World(Side(Custody.MINE, runs=True), Side(Custody.THEIRS), one_host)

    def steps(self, world: World) -> Steps:
        yield from self.progress(world)
        yield from self.faults(world)

    def progress(self, world: World) -> Steps:
        yield from self._source(world)
        yield from self._destination(world)

    def _note(self, world: World, role: Role, event: Event) -> World:
        table = self.rules.source if role is Role.SOURCE else self.rules.destination
        custody = table.get((world.side(role).custody, event))
        if custody is None:
            return world._replace(defect=f"{event.name} when the {role.value} is {world.side(role).custody.name}")
        return world.put(role, custody=custody)

    def _may_say(self, world: World, role: Role, kind: Kind) -> bool:
        room = len(world.inbound(_other(role))) < self.rules.capacity
        return room and role in self.rules.senders[kind] and (world.side(role).stage, kind) in self.rules.transitions

    def _say(self, world: World, role: Role, kind: Kind) -> World:
        if world.side(_other(role)).program is not Program.ENDED:
            world = world.queue(_other(role), (*world.inbound(_other(role)), kind))
        return world.put(role, stage=self.rules.transitions[world.side(role).stage, kind])

    def _hear(self, world: World, role: Role) -> tuple[Kind, World]:
        kind, *rest = world.inbound(role)
        stage = self.rules.transitions.get((world.side(role).stage, kind))
        if stage is None or _other(role) not in self.rules.senders[kind]:
            return kind, world._replace(defect=f"{kind.__name__} when the {role.value} is {world.side(role).stage}")
        return kind, world.queue(role, tuple(rest)).put(role, stage=stage)

    def _source(self, world: World) -> Steps:
        me = world.source
        if me.program is Program.ENDED and me.alive and me.custody is Custody.MINE and not me.runs:
            yield "source: runs the guest on", world.put(Role.SOURCE, runs=True)
        if me.program is Program.RESOLVING:
            yield from self._resolve(world)
        if me.program is not Program.TALKING:
            return
        if me.custody is Custody.OFFERED and (me.stage, Handover) in self.rules.transitions:
            yield from self._hand_over(world)
            return
        if me.runs and me.stage in (Stage.STREAMING, Stage.SHARED):
            yield "source: stops the guest", world.put(Role.SOURCE, runs=False)
        for kind in self._kinds:
            if self._may_say(world, Role.SOURCE, kind):
                yield from self._source_says(world, kind)
        if world.to_source:
            kind, heard = self._hear(world, Role.SOURCE)
            yield f"source: hears {kind.__name__}", self._source_heard(heard, kind)
        if _may_lose(world, Role.SOURCE):
            yield "source: finds the connection lost", self._source_lost(world)

    def _source_says(self, world: World, kind: Kind) -> Steps:
        me = world.source
        if kind is Handover:
            yield "source: lets go", self._note(world, Role.SOURCE, Event.HANDOVER)
            return
        still = not me.runs or not self.rules.stops_first
        allowed = {
            Hello: not me.resumes,
            Resume: me.resumes,
            Shared: me.runs,
            Digests: still and (me.mapped or me.stage is not Stage.SHARED),
            State: still and (me.mapped or me.stage is not Stage.SHARED),
            Owed: still,
            Failed: False,
            Join: False,
        }
        if allowed.get(kind, True):
            said = self._say(world, Role.SOURCE, kind)
            yield f"source: says {kind.__name__}", said.put(Role.SOURCE, owes=True) if kind is Owed else said

    def _hand_over(self, world: World) -> Steps:
        if self._may_say(world, Role.SOURCE, Handover):
            yield "source: says Handover", self._say(world, Role.SOURCE, Handover)
        if world.link is not Link.OPEN:
            not_said = self._note(world, Role.SOURCE, Event.NOT_SAID)
            yield "source: cannot say Handover", not_said.stop(Role.SOURCE, Program.ENDED)

    def _source_heard(self, world: World, kind: Kind) -> World:
        me = world.source
        if kind is Taken:
            world = self._note(world, Role.SOURCE, Event.TAKEN)
            return (
                world.put(Role.SOURCE, program=Program.TALKING) if me.owes else world.stop(Role.SOURCE, Program.ENDED)
            )
        if kind is Failed:
            return self._note(world, Role.SOURCE, Event.REFUSED).stop(Role.SOURCE, Program.ENDED)
        if kind is PassDone and me.stage is Stage.FINISHED:
            return world.stop(Role.SOURCE, Program.ENDED)
        if kind is Resumed and me.custody is Custody.DOUBTFUL:
            return self._note(world, Role.SOURCE, Event.TAKEN)
        return world.put(Role.SOURCE, mapped=True) if me.stage is Stage.SHARED else world

    def _source_lost(self, world: World) -> World:
        if world.source.custody is Custody.DOUBTFUL:  # resumed, and nobody answered
            return world.stop(Role.SOURCE, Program.PAUSED)
        world = self._note(world, Role.SOURCE, Event.LOST)
        if world.source.custody is Custody.DOUBTFUL:  # what has arrived may still be read
            return world.put(Role.SOURCE, program=Program.RESOLVING)
        return world.stop(Role.SOURCE, Program.ENDED if world.source.custody is Custody.MINE else Program.PAUSED)

    def _resolve(self, world: World) -> Steps:
        if not self.rules.proof(world):
            program = Program.PAUSED if world.source.owes else Program.ENDED
            yield "source: is in doubt", world.stop(Role.SOURCE, program)
            return
        if world.to_source:
            kind, heard = self._hear(world, Role.SOURCE)
            yield f"source: finds that {kind.__name__} was said", self._source_heard(heard, kind)
        if not world.to_source or world.link is Link.CUT:
            gone = self._note(world, Role.SOURCE, Event.GONE)
            yield "source: knows that the destination ended", gone.stop(Role.SOURCE, Program.ENDED)

    def _destination(self, world: World) -> Steps:
        me = world.destination
        if me.program is not Program.TALKING:
            return
        if me.custody is Custody.MINE and (not me.ran or self._may_say(world, Role.DESTINATION, Taken)):
            yield from self._take_over(world)
            return
        if me.custody is Custody.NEVER:
            given_up = self._note(world, Role.DESTINATION, Event.GIVEN_UP)
            yield "destination: gives up", given_up.stop(Role.DESTINATION, Program.ENDED)
        else:
            for kind in self._kinds:
                if self._may_say(world, Role.DESTINATION, kind):
                    yield from self._destination_says(world, kind)
        if world.to_destination:
            kind, heard = self._hear(world, Role.DESTINATION)
            yield f"destination: hears {kind.__name__}", self._destination_heard(heard, kind)
        if _may_lose(world, Role.DESTINATION):
            lost = self._note(world, Role.DESTINATION, Event.LOST)
            yield "destination: finds the connection lost", self._destination_lost(lost)

    def _take_over(self, world: World) -> Steps:
        me = world.destination
        unsaid = self._may_say(world, Role.DESTINATION, Taken)
        if unsaid and me.ran is not self.rules.starts_after:
            yield "destination: says Taken", self._say(world, Role.DESTINATION, Taken)
        elif not me.ran:
            started = world.put(Role.DESTINATION, runs=True, ran=True)
            done = self.rules.starts_after and not me.owes
            yield "destination: starts the guest", started.stop(Role.DESTINATION, Program.ENDED) if done else started

    def _destination_says(self, world: World, kind: Kind) -> Steps:
        me = world.destination
        if kind in (Failed, Taken) or (me.stage is Stage.SHARED and me.mapped):
            return
        said = self._say(world, Role.DESTINATION, kind)
        if kind is Ready:
            said = said.put(Role.DESTINATION, ready=True)
        if kind is PassDone and me.stage is Stage.SHARED:
            said = said.put(Role.DESTINATION, mapped=True)
        if said.destination.stage is Stage.FINISHED:
            said = said.put(Role.DESTINATION, owes=False).stop(Role.DESTINATION, Program.ENDED)
        yield f"destination: says {kind.__name__}", said

    def _destination_heard(self, world: World, kind: Kind) -> World:
        if kind is Owed:
            return world.put(Role.DESTINATION, owes=True)
        if kind is not Handover:
            return world
        world = self._note(world, Role.DESTINATION, Event.HANDOVER)
        return world if world.destination.custody is Custody.MINE else world.stop(Role.DESTINATION, Program.ENDED)

    def _destination_lost(self, world: World) -> World:
        if world.destination.custody is Custody.NEVER:
            return world.stop(Role.DESTINATION, Program.ENDED)
        return world.stop(Role.DESTINATION, Program.PAUSED) if world.destination.ran else world

    def faults(self, world: World) -> Steps:
        happenings: dict[Fault, Callable[[World], World | None]] = {
            Fault.CUT: lambda world: world._replace(link=Link.CUT) if world.link is not Link.CUT else None,
            Fault.SOURCE_DIES: lambda world: world.kill(Role.SOURCE) if world.source.alive else None,
            Fault.DESTINATION_DIES: lambda world: world.kill(Role.DESTINATION) if world.destination.alive else None,
            Fault.CANCEL: self._cancel,
            Fault.ABORT: self._abort,
            Fault.REFUSE: self._refuse,
            Fault.RECOVER: self._recover,
            Fault.CONT: self._cont,
        }
        for fault in Fault:
            if fault in self._allowed and (following := happenings[fault](world)) is not None:
                yield f"({fault.value})", following

    def _cancel(self, world: World) -> World | None:
        me = world.source
        if me.program is not Program.TALKING or me.custody not in self.rules.cancels:
            return None
        return world.put(Role.SOURCE, custody=Custody.MINE).stop(Role.SOURCE, Program.ENDED)

    def _abort(self, world: World) -> World | None:
        me = world.destination
        if me.program is Program.ENDED or me.custody is Custody.NEVER:
            return None
        following = self._note(world, Role.DESTINATION, Event.GIVEN_UP)
        if following.destination.custody is Custody.NEVER:
            return following.closed()
        if not me.owes:
            return None
        return following.put(Role.DESTINATION, runs=False).stop(Role.DESTINATION, Program.ENDED)

    def _refuse(self, world: World) -> World | None:
        me = world.destination
        talks = me.program is Program.TALKING and me.custody in self.rules.refuses
        if not talks or not self._may_say(world, Role.DESTINATION, Failed):
            return None
        refused = self._note(world, Role.DESTINATION, Event.GIVEN_UP)
        return self._say(refused, Role.DESTINATION, Failed).stop(Role.DESTINATION, Program.ENDED)

    def _recover(self, world: World) -> World | None:
        if {world.source.program, world.destination.program} != {Program.PAUSED}:
            return None
        world = world.put(Role.SOURCE, stage=Stage.OPENING, program=Program.TALKING, resumes=True)
        world = world.put(Role.DESTINATION, stage=Stage.OPENING, program=Program.TALKING)
        return world._replace(link=Link.OPEN, to_source=(), to_destination=())

    def _cont(self, world: World) -> World | None:
        me = world.source
        if not me.alive or me.program is not Program.ENDED or me.custody is not Custody.DOUBTFUL:
            return None
        return self._note(world, Role.SOURCE, Event.GONE) if self.rules.cont(world.destination) else None


def _other(role: Role) -> Role:
    return Role.DESTINATION if role is Role.SOURCE else Role.SOURCE


def _may_lose(world: World, role: Role) -> bool:
    return world.link is Link.CUT or (world.link is Link.CLOSED and not world.inbound(role))


def _representatives(rules: Rules) -> tuple[Kind, ...]:
    """One of each set of messages that the tables treat alike, such as those that carry memory."""
    ways: dict[object, Kind] = {}
    for kind, senders in rules.senders.items():
        rows = frozenset((start, end) for (start, one), end in rules.transitions.items() if one is kind)
        ways.setdefault((rows, senders), kind)
    return tuple(ways.values())
