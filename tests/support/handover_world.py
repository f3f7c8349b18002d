"""What `handover_model` looks at: both sides of a migration and what is under way between them, at one moment."""

from enum import Enum, auto
from typing import Any, NamedTuple

from dirtylog.migration.custody import Custody
from dirtylog.migration.messages import Message
from dirtylog.migration.protocol import Role, Stage

Kind = type[Message]


class Program(Enum):
    """What a side's thread does."""

    TALKING = auto()
    RESOLVING = auto()
    """The source has lost the connection after the handover, and looks whether the destination has ended."""
    PAUSED = auto()
    """It waits for another connection, in postcopy."""
    ENDED = auto()


class Link(Enum):
    """The connection."""

    OPEN = auto()
    CLOSED = auto()
    """By one side, or by its death: what that side said before arrives."""
    CUT = auto()
    """Any part of what is under way arrives, up to a point."""


class Side(NamedTuple):
    """One process, and what it knows."""

    custody: Custody
    stage: Stage = Stage.OPENING
    program: Program = Program.TALKING
    alive: bool = True
    runs: bool = False
    ran: bool = False
    """Whether the guest ran here after the handover."""
    ready: bool = False
    """Whether this side said ``Ready``."""
    mapped: bool = False
    """Whether the answer to ``Shared`` was said, or heard."""
    owes: bool = False
    """Whether memory comes after the guest."""
    resumes: bool = False
    """Whether the source goes on with a migration over another connection."""

    def __str__(self) -> str:
        enums = (self.custody.name, self.stage.name, self.program.name)
        return " ".join((*enums, *(name for name, value in self._asdict().items() if value is True)))


class World(NamedTuple):
    """Everything at one moment."""

    source: Side
    destination: Side
    one_host: bool
    """Whether the source can see that the destination's process has ended."""
    to_source: tuple[Kind, ...] = ()
    to_destination: tuple[Kind, ...] = ()
    link: Link = Link.OPEN
    defect: str = ""
    """What happened that has no row in a table."""

    def __str__(self) -> str:
        queues = (", ".join(kind.__name__ for kind in kinds) for kinds in (self.to_destination, self.to_source))
        way = f"{self.link.name} [{'] ['.join(queues)}]"
        return f"source: {self.source} | {way} | destination: {self.destination}{self.defect and ' | ' + self.defect}"

    def side(self, role: Role) -> Side:
        return self.source if role is Role.SOURCE else self.destination

    def inbound(self, role: Role) -> tuple[Kind, ...]:
        return self.to_source if role is Role.SOURCE else self.to_destination

    def put(self, role: Role, **changes: Any) -> "World":
        side = self.side(role)._replace(**changes)
        return self._replace(source=side) if role is Role.SOURCE else self._replace(destination=side)

    def queue(self, role: Role, kinds: tuple[Kind, ...]) -> "World":
        return self._replace(to_source=kinds) if role is Role.SOURCE else self._replace(to_destination=kinds)

    def closed(self) -> "World":
        return self._replace(link=Link.CLOSED) if self.link is Link.OPEN else self

    def stop(self, role: Role, program: Program) -> "World":
        """One side hears and says no more."""
        return self.put(role, program=program).queue(role, ()).closed()

    def kill(self, role: Role) -> "World":
        return self.stop(role, Program.ENDED).put(role, alive=False, runs=False, stage=Stage.OPENING)
