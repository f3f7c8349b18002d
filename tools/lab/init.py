"""The first program of the guest: makes a usable system, carries out the order, and ends the machine."""

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
import termios
import traceback
from pathlib import Path
from typing import Final

import msgspec

from tools.lab.protocol import ORDER, Ended, Order

EVENTS: Final = "/dev/ttyS1"
_MOUNTS: Final = (
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("devpts", "/dev/pts"),
    ("tmpfs", "/dev/shm"),  # noqa: S108 - the guest's
)
_RESTART: Final = 0x0123_4567  # LINUX_REBOOT_CMD_RESTART
_INTERFACE: Final = struct.Struct("16sh14x")  # struct ifreq, with flags
_SET_FLAGS: Final = 0x8914  # SIOCSIFFLAGS
_UP: Final = 0x1  # IFF_UP
_CREATE_VM: Final = 0xAE01  # KVM_...
_CREATE_VCPU: Final = 0xAE41
_CREATE_IRQCHIP: Final = 0xAE60

_libc: Final = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Run as process 1. That the machine restarts is what ends it: see `tools.lab.machine`."""
    try:
        _prepare()
        order = msgspec.json.decode(Path(ORDER).read_bytes(), type=Order)
        _load(order.modules)
        _steady_kernel()
        with open(EVENTS, "wb", buffering=0) as events:
            _make_raw(events.fileno())
            events.write(msgspec.json.encode(Ended(_run(order))) + b"\n")
            termios.tcdrain(events)
    except Exception:  # noqa: BLE001 - nobody else would show it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        termios.tcdrain(1)
        _check(_libc.reboot(_RESTART), "reboot")


def _prepare() -> None:
    for kind, place in _MOUNTS:
        os.makedirs(place, exist_ok=True)
        _check(_libc.mount(kind.encode(), place.encode(), kind.encode(), 0, None), f"mount {place}")
    Path("/tmp").mkdir(exist_ok=True)  # noqa: S108
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, _INTERFACE.pack(b"lo", _UP))


def _load(modules: list[str]) -> None:
    for name in modules:
        content = Path(name).read_bytes()
        _check(_libc.init_module(content, ctypes.c_ulong(len(content)), b""), f"init_module {name}")


def _steady_kernel() -> None:
    """Have the kernel not rewrite its own code while tests run.

    KVM switches static branches, one in the scheduler among them, with its first and last machine, with the first and
    last vCPU without an APIC, and with one whose APIC is off. QEMU 7.2, translating on several threads, may keep a
    translation of the breakpoint that the kernel puts there meanwhile: both CPUs then run into it for ever. Machines
    that exist all the time keep the branches as they are.
    """
    kvm = os.open("/dev/kvm", os.O_RDWR)
    without_apic = fcntl.ioctl(kvm, _CREATE_VM)
    fcntl.ioctl(without_apic, _CREATE_VCPU)
    with_apic = fcntl.ioctl(kvm, _CREATE_VM)
    fcntl.ioctl(with_apic, _CREATE_IRQCHIP)
    fcntl.ioctl(with_apic, _CREATE_VCPU)


def _make_raw(descriptor: int) -> None:
    """Nothing is echoed or translated."""
    attributes = termios.tcgetattr(descriptor)
    attributes[0] = attributes[1] = attributes[3] = 0
    termios.tcsetattr(descriptor, termios.TCSANOW, attributes)


def _run(order: Order) -> int:
    """Carry out the order; the exit status."""
    process = subprocess.Popen(order.command, cwd=order.directory, env=order.environment, preexec_fn=_take_terminal)
    while True:
        number, status = os.wait()  # whoever lost its parent is ours, too
        if number == process.pid:
            return os.waitstatus_to_exitcode(status)


def _take_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 1)


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
