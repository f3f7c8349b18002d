"""``dirtylog run``: run a guest, or wait for one to arrive."""

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import click

from dirtylog.cli.log import shown_log
from dirtylog.cli.options import ADDRESS, SIZE, UnitType
from dirtylog.cli.serial_output import SerialOutput
from dirtylog.cli.signals import EndOnSignals
from dirtylog.control.commands import Commands, emit_events
from dirtylog.control.controller import Controller, ShutdownCause
from dirtylog.control.metrics import MetricsServer, parse_endpoint
from dirtylog.control.qmp import CommandRegistry, QMPServer
from dirtylog.errors import HostError, UsageError
from dirtylog.linux.kvm import KVM
from dirtylog.machine import BootMode, KVMMachine, PCMachine, boot_flat, boot_sector
from dirtylog.migration import Address, FileAddress, Listener, Role, credentials_for, parse_address
from dirtylog.trackers import KVMLogMode
from dirtylog.units import MIB


class Accel(Enum):
    """What runs a guest."""

    AUTO = "auto"
    KVM = "kvm"
    UNICORN = "unicorn"


@dataclass(frozen=True, slots=True)
class Image:
    """A file to boot, and how; a boot sector unless there is a load address."""

    path: Path
    load_address: int | None
    entry: int | None
    mode: BootMode

    def boot(self, machine: PCMachine) -> None:
        """Load it and point the boot vCPU at it.

        Raises:
            UsageError: it is missing, empty, too large, or cannot be started that way.
        """
        content = self._read(sum(block.size for block in machine.memory.blocks.values()))
        if self.load_address is None:
            boot_sector(machine, content)
        else:
            boot_flat(machine, content, self.load_address, entry=self.entry, mode=self.mode)

    def _read(self, limit: int) -> bytes:
        try:
            # Without O_NONBLOCK the open of a FIFO waits for a writer, and no signal could end that.
            with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                os.set_blocking(file.fileno(), True)
                size = os.fstat(file.fileno()).st_size
                content = bytearray()
                # What is no file tells no size. Asking for all at once would allocate it.
                while size <= limit and len(content) <= limit and (part := file.read(MIB)):
                    content += part
        except OSError as error:
            raise UsageError(
                f"the image {self.path} cannot be read: {error.strerror}",
                remedy="name a boot image; 'dirtylog guest' writes one",
            ) from error
        if max(size, len(content)) > limit:
            raise UsageError(f"the image {self.path} is larger than memory", remedy="give more with --memory")
        return bytes(content)


@click.command("run")
@click.argument("image", type=click.Path(path_type=Path), required=False)
@click.option("--memory", type=SIZE, default="128M", show_default=True, help="RAM of the guest, whole 4K pages.")
@click.option("--cpus", type=click.IntRange(1, 255), default=1, show_default=True, help="How many vCPUs.")
@click.option("--qmp", metavar="PATH", help="Serve QMP on a Unix socket there. Whoever can open it controls the guest.")
@click.option(
    "--metrics",
    type=UnitType("[host:]port", parse_endpoint),
    help="Serve numbers for Prometheus there over HTTP; to this host alone unless a host is given.",
)
@click.option(
    "--incoming", metavar="URI", help="Boot nothing; take over a guest that is, or to a file was, migrated to URI."
)
@click.option(
    "--tls-creds",
    metavar="DIR",
    help="Certificates and keys for tls:HOST:PORT, as an --incoming and for migrations away from here.",
)
@click.option("--tls-hostname", metavar="NAME", help="For migrations away from here, see 'migrate --tls-hostname'.")
@click.option("--serial", metavar="PATH", help="Write the guest's serial output there, not to standard output.")
@click.option(
    "--accel",
    type=click.Choice([accel.value for accel in Accel]),
    default=Accel.AUTO.value,
    show_default=True,
    help="What runs the guest: KVM, or the emulator Unicorn; auto takes KVM where it can.",
)
@click.option(
    "--dirty-log",
    type=click.Choice([mode.value for mode in KVMLogMode]),
    help="How KVM logs dirty pages; the last but ring that the kernel offers unless given.",
)
@click.option(
    "--dirty-ring-size",
    type=int,
    metavar="ENTRIES",
    help="How many dirty pages the ring of each vCPU holds, a power of two; 65536 unless given.",
)
@click.option("--load-address", type=ADDRESS, help="IMAGE is a flat binary to be loaded there, not a boot sector.")
@click.option("--entry", type=ADDRESS, help="Where a flat binary starts; its load address unless given.")
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
    metrics: tuple[str, int] | None,
    incoming: str | None,
    tls_creds: str | None,
    tls_hostname: str | None,
    serial: str | None,
    accel: str,
    dirty_log: str | None,
    dirty_ring_size: int | None,
    load_address: int | None,
    entry: int | None,
    mode: str,
    paused: bool,
) -> None:
    """Run the boot image IMAGE as a guest, until it ends, or 'quit' over QMP, SIGINT or SIGTERM ends it.

    IMAGE is started as a PC BIOS starts a disk: its first 512 bytes at 0x7c00, in real mode. The guest has a serial
    port at 0x3f8, whose output is printed.

    With --incoming the memory must be as large as the source's, and IMAGE is not needed. URI is unix:PATH,
    tcp:HOST:PORT, tls:HOST:PORT or file:PATH; no HOST means 127.0.0.1, which only this host reaches. What goes to tcp:
    can be read and replaced on its way, and anybody may connect: use tls: on networks. Whoever connects and is no
    source, or one that does not fit, is turned away with a line that says why, and the source is waited for.
    """
    boots = None if image is None else Image(image, load_address, entry, BootMode(mode))
    _check_options(boots, incoming, paused=paused)
    with ExitStack() as stack:
        signals = stack.enter_context(EndOnSignals())
        stack.enter_context(shown_log())
        address = None if incoming is None else parse_address(incoming)
        creds = os.path.abspath(tls_creds) if tls_creds else ""
        listener = None if address is None or isinstance(address, FileAddress) else _listen(stack, address, creds)
        log_mode = None if dirty_log is None else KVMLogMode(dirty_log)
        machine = _make_machine(Accel(accel), memory, cpus, log_mode, dirty_ring_size, _open_serial(stack, serial))
        controller = Controller(machine)
        stack.callback(controller.close)
        controller.change_parameters(tls_creds=creds, tls_hostname=tls_hostname or "")
        signals.watch(lambda: controller.quit(ShutdownCause.HOST_SIGNAL))
        server = None if qmp is None else _prepare_server(stack, controller, qmp)
        if metrics is not None:
            _serve_metrics(stack, controller, *metrics)
        if listener is not None:
            controller.receive(listener)
        elif isinstance(address, FileAddress):
            controller.receive_file(address.path)
        elif boots is not None:
            boots.boot(machine)
            if not paused:
                machine.resume()
        if server is not None:
            server.start()  # only now, so that no client meets a machine that is not what it is to be
        if listener is not None:
            click.echo(f"dirtylog: waiting for a guest at {listener.address}", err=True)
        elif isinstance(address, FileAddress):
            click.echo(f"dirtylog: taking the guest over from {address}", err=True)
        controller.wait()


def _make_machine(
    accel: Accel,
    memory: int,
    cpus: int,
    log_mode: KVMLogMode | None,
    ring_size: int | None,
    serial: SerialOutput | None,
) -> PCMachine:
    """The machine, KVM's unless that is not wanted, or cannot be had and need not."""
    if ring_size is not None and log_mode is not KVMLogMode.RING:
        raise UsageError("--dirty-ring-size is for --dirty-log ring", remedy="give both, or none")
    if accel is Accel.UNICORN and log_mode is not None:
        raise UsageError("--dirty-log is KVM's, and the guest is to run in Unicorn", remedy="leave one of them out")
    lacking = None if accel is not Accel.AUTO or log_mode is not None else _why_not_kvm()
    if accel is not Accel.UNICORN and lacking is None:
        return KVMMachine(memory, cpus=cpus, log_mode=log_mode, ring_size=ring_size, transmit=serial)
    if lacking is not None:
        click.echo(f"dirtylog: {lacking.cause}: the guest runs in Unicorn, an emulator", err=True)
    from dirtylog.machine import UnicornMachine  # a large library, for those who need it

    return UnicornMachine(memory, cpus=cpus, transmit=serial)


def _why_not_kvm() -> HostError | None:
    try:
        with KVM():
            return None
    except HostError as error:
        return error


def _check_options(image: Image | None, incoming: str | None, *, paused: bool) -> None:
    if image is None and incoming is None:
        raise UsageError("there is nothing to run", remedy="name an IMAGE, or wait for a guest with --incoming URI")
    if incoming is not None and paused:
        raise UsageError(
            "--paused cannot hold a guest that arrives with --incoming",
            remedy="leave it out; a guest that is stopped before it is migrated arrives stopped",
        )
    if (
        image is not None
        and image.load_address is None
        and (image.entry is not None or image.mode is not BootMode.REAL)
    ):
        raise UsageError(
            "--entry and --mode are for flat binaries, and IMAGE is a boot sector without a load address",
            remedy="say with --load-address where a flat binary is to be loaded",
        )


def _listen(stack: ExitStack, address: Address, creds: str) -> Listener:
    listener = Listener(address, credentials_for(address, creds, Role.DESTINATION))
    stack.callback(listener.close)
    return listener


def _prepare_server(stack: ExitStack, controller: Controller, path: str) -> QMPServer:
    registry = CommandRegistry()
    Commands(controller).register(registry)
    server = QMPServer(path, registry, on_failure=controller.fail)
    stack.callback(server.close)
    emit_events(controller, server)
    return server


def _serve_metrics(stack: ExitStack, controller: Controller, host: str, port: int) -> None:
    server = stack.enter_context(MetricsServer(controller, host, port))
    click.echo(f"dirtylog: metrics at {server.url}", err=True)


def _open_serial(stack: ExitStack, path: str | None) -> SerialOutput | None:
    """Where serial output goes; nowhere if there is no standard output."""

    def complain(error: OSError) -> None:
        click.echo(f"dirtylog: warning: serial output is lost from here on: {error.strerror}", err=True)

    if path is not None:
        try:
            # With O_NONBLOCK a FIFO that nobody reads is an error; without, no signal could end the wait for a reader.
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            os.set_blocking(fd, True)
        except OSError as error:
            raise HostError(
                f"cannot write serial output to {path}: {error.strerror}", remedy="choose a place you may write to"
            ) from error
        stack.callback(os.close, fd)
    elif sys.stdout is not None:
        fd = sys.stdout.fileno()
    else:
        return None
    output = SerialOutput(fd, complain)
    stack.callback(output.close)
    return output
