"""A process that is one side of a migration and stands still at a checkpoint, to be killed there.

Arguments: the side, the kind of machine, the address, the checkpoint, or ``-`` for none, and whether memory is
``copied``, ``shared`` or comes after the guest (``postcopy``), which a source decides. It prints a line for all that
happens: ``listening``, each new state of the machine, ``halted`` at the checkpoint, ``done`` or ``error`` at last.
"""

import signal
import sys

from support.checkpoints import Checkpoint, install
from support.guests import machine, wait_for_rounds

from dirtylog.errors import DirtylogError
from dirtylog.migration import IncomingMigration, Listener, OutgoingMigration, Parameters, parse_address
from dirtylog.migration.protocol import Role


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - how the test hears of it


def halt() -> None:
    say("halted")
    while True:
        signal.pause()


def send(kind: str, uri: str, way: str) -> None:
    with machine(kind, boot=True) as guest:
        guest.observers.append(lambda _, new: say(new.value))
        guest.resume()
        wait_for_rounds(guest)
        postcopy = way == "postcopy"
        parameters = Parameters(verify=not postcopy, share_memory=way == "shared", postcopy=postcopy)
        outgoing = OutgoingMigration(guest, parse_address(uri), parameters)
        if postcopy:
            outgoing.start_postcopy()
        outgoing.run()


def receive(kind: str, uri: str, _: str) -> None:
    with machine(kind, boot=False) as guest:
        guest.observers.append(lambda _, new: say(new.value))
        listener = Listener(parse_address(uri))
        try:
            incoming = IncomingMigration(guest, listener)
            say("listening")
            incoming.run()
        finally:
            listener.close()


def main(side: str, kind: str, uri: str, checkpoint: str, way: str) -> int:
    if checkpoint != "-":
        install(Checkpoint.parse(checkpoint), halt, setattr)
    try:
        (send if Role(side) is Role.SOURCE else receive)(kind, uri, way)
    except DirtylogError as error:
        say(f"error {error}")
        return 1
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
