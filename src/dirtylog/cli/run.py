"""``dirtylog run``: run a guest, or wait for one to arrive."""

import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click

from dirtylog.cli.options import SIZE
from dirtylog.cli.serial_output import SerialOutput
from dirtylog.control.commands import Commands, emit_events
from dirtylog.control.controller import Controller
from dirtylog.control.qmp import CommandRegistry, QMPServer
from dirtylog.errors import HostError, UsageError
from dirtylog.machine import BootMode, KVMMachine, boot_flat, boot_sector
from dirtylog.migration import Listener, parse_address
from dirtylog.trackers import KVMLogMode


@dataclass(frozen=True, slots=True)
class Image:
    """A file to boot, and how; a boot sector unless there is a load address."""

    path: Path
    load_address: int | None
    entry: int | None
    mode: BootMode

    def boot(self, machine: KVMMachine) -> None:
        """Load it and point the boot vCPU at it.

        Raises:
            UsageError: it is missing, empty, too large, or cannot be started that way.
        """
        try:
            if self.path.stat().st_size > sum(block.size for block in machine.memory.blocks.values()):
                raise UsageError(f"the image {self.path} is larger than memory", remedy="give more with --memory")
            content = self.path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"the image {self.path} cannot be read: {error.strerror}",
                remedy="name a boot image; 'dirtylog guest' writes one",
            ) from error
        if self.load_address is None:
            boot_sector(machine, content)
        else:
            boot_flat(machine, content, self.load_address, entry=self.entry, mode=self.mode)


@click.command("run")
@click.argument("image", type=click.Path(path_type=Path), required=False)
@click.option("--memory", type=SIZE, default="128M", show_default=True, help="RAM of the guest, whole 4K pages.")
@click.option("--cpus", type=click.IntRange(1, 255), default=1, show_default=True, help="How many vCPUs.")
@click.option("--qmp", metavar="PATH", help="Serve QMP on a Unix socket there. Whoever can open it controls the guest.")
@click.option("--incoming", metavar="URI", help="Boot nothing; take a guest over that is migrated to URI.")
@click.option("--serial", metavar="PATH", help="Write the guest's serial output to a file, not to standard output.")
@click.option("--accel", type=click.Choice(["kvm"]), default="kvm", show_default=True, help="What runs the guest.")
@click.option(
    "--dirty-log",
    type=click.Choice([mode.value for mode in KVMLogMode]),
    help="How KVM logs dirty pages; the last that the kernel offers unless given.",
)
@click.option("--load-address", type=SIZE, help="IMAGE is a flat binary to be loaded there, not a boot sector.")
@click.option("--entry", type=SIZE, help="Where a flat binary starts; its load address unless given.")
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in BootMode]),
    default=BootMode.REAL.value,
    show_default=True,
    help="The CPU mode a flat binary starts in.",
)
@click.option("--paused", is_flag=True, help="Do not start the guest until 'cont'.")
def command(
    image: Path | None,
    memory: int,
    cpus: int,
    qmp: str | None,
    incoming: str | None,
    serial: str | None,
    accel: str,
    dirty_log: str | None,
    load_address: int | None,
    entry: int | None,
    mode: str,
    paused: bool,
) -> None:
    """Run the boot image IMAGE as a guest, until it ends, 'quit' comes over QMP, or SIGINT or SIGTERM.

    IMAGE is started as a PC BIOS starts a disk: its first 512 bytes at 0x7c00, in real mode. The guest has a serial
    port at 0x3f8, whose output is printed.

    With --incoming the memory must be as large as the source's, and IMAGE is not needed.
    """
    del accel
    if image is None and incoming is None:
        raise UsageError("there is nothing to run", remedy="name an IMAGE, or wait for a guest with --incoming URI")
    with ExitStack() as stack:
        output = _open_serial(stack, serial)
        listener = None
        if incoming is not None:
            listener = Listener(parse_address(incoming))
            stack.callback(listener.close)
        machine = KVMMachine(
            memory, cpus=cpus, log_mode=None if dirty_log is None else KVMLogMode(dirty_log), transmit=output
        )
        controller = Controller(machine)
        stack.callback(controller.close)
        if qmp is not None:
            stack.callback(_serve(controller, qmp).close)
        _end_on_signals(stack, controller)
        if listener is not None:
            controller.receive(listener)
            click.echo(f"dirtylog: waiting for a guest at {listener.address}", err=True)
        elif image is not None:
            Image(image, load_address, entry, BootMode(mode)).boot(machine)
            if not paused:
                machine.resume()
        controller.wait()


def _serve(controller: Controller, path: str) -> QMPServer:
    registry = CommandRegistry()
    Commands(controller).register(registry)
    server = QMPServer(path, registry, on_failure=controller.fail)
    emit_events(controller, server)
    server.start()
    return server


def _open_serial(stack: ExitStack, path: str | None) -> SerialOutput:
    def complain(error: OSError) -> None:
        click.echo(f"dirtylog: warning: serial output is lost from here on: {error.strerror}", err=True)

    if path is None:
        fd = sys.stdout.fileno()
    else:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise HostError(f"cannot write serial output to {path}: {error.strerror}") from error
        stack.callback(os.close, fd)
    output = SerialOutput(fd, complain)
    stack.callback(output.close)
    return output


def _end_on_signals(stack: ExitStack, controller: Controller) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        previous = signal.signal(number, lambda *_: controller.quit())
        stack.callback(signal.signal, number, previous)
