"""Move a running numpy simulation from one host to another and lose no step: both hosts made of this one.

A host is a network namespace here, with a network stack, an interface and an address of its own; a pair of virtual
interfaces is the cable between the two. In each runs the command that ``moving_simulation.py`` tells for two hosts,
over TLS with certificates made for this. Exit status 0 if the simulation went on at the step at which it had left, and
ended with the very cells of one that nobody moved.

It needs root, or a kernel that lets users make namespaces. The namespaces have no names, so they go with the processes
in them, and those are killed when this one ends, in whatever way. Nothing else is left behind, but for a temporary
folder with the certificates if it is killed itself.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from dirtylog.units import format_size

SIMULATION = (sys.executable, str(Path(__file__).with_name("moving_simulation.py")))
SOURCE, DESTINATION = "10.0.0.1", "10.0.0.2"
PACKAGES = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}
"""Debian's, of the commands that this needs."""
OWN_USERS = ("unshare", "--user", "--map-root-user")
"""Runs a command as root of a namespace in which there is nobody else."""
AUTHORITY = r"""
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -keyout ca-key.pem -out ca-cert.pem \
    -subj "/CN=two hosts" -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign"
"""
CREDENTIALS = r"""
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $1/$2-key.pem -out $1.csr -subj "/CN=$1"
printf 'subjectAltName=IP:%s\n' $1 > $1.ext
openssl x509 -req -in $1.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 1 -extfile $1.ext \
    -out $1/$2-cert.pem
cp ca-cert.pem $1/
"""
"""Both as in ``docs/security.md``."""


class Child(subprocess.Popen[str]):
    """A process that was started, and that is killed when this one ends."""

    def __init__(self, *command: str) -> None:
        self.command = command
        super().__init__(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which ends the others
        )


class Host:
    """A network namespace, which lives as long as a process in it that waits for its input to end."""

    def __init__(self, address: str, stack: ExitStack) -> None:
        self.address = address
        self._stack = stack
        holder = start(stack, "unshare", "--net", "sh", "-c", "echo made; exec cat")
        if not line_of(holder):
            raise SystemExit("two_hosts.py: error: no network namespace can be made; a container needs CAP_SYS_ADMIN")
        self.namespace = f"/proc/{holder.pid}/ns/net"

    def start(self, *command: str) -> Child:
        """Start a command in it."""
        return start(self._stack, "nsenter", f"--net={self.namespace}", *command)

    def ip(self, *arguments: str) -> str:
        """Have ``ip`` do something there; what it says."""
        return result(self.start("ip", *arguments))


def start(stack: ExitStack, *command: str) -> Child:
    """Start a command, which is ended with the stack."""
    child = Child(*command)
    stack.callback(end, child)
    return child


def end(child: Child) -> None:
    """End a process, if it has not ended."""
    child.kill()
    child.communicate()


def line_of(child: Child) -> str:
    """The next line that it prints; empty if it has ended."""
    return next(iter(child.stdout or ()), "")


def result(child: Child) -> str:
    """What a process prints until it ends well."""
    said, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"two_hosts.py: error: status {child.returncode} of {shlex.join(child.command)}")
    return said


def connect(source: Host, destination: Host) -> None:
    """Lay the cable."""
    peer = ("peer", "name", "cable", "netns", destination.namespace)
    source.ip("link", "add", "cable", "type", "veth", *peer)
    for host in (source, destination):
        host.ip("address", "add", f"{host.address}/24", "dev", "cable")
        host.ip("link", "set", "cable", "up")


def make_credentials(folder: Path) -> None:
    """Make a directory for each host, with its address for a name, in a folder."""
    scripts = [(AUTHORITY,), (CREDENTIALS, SOURCE, "client"), (CREDENTIALS, DESTINATION, "server")]
    for script, *arguments in scripts:
        for host in arguments[:1]:
            (folder / host).mkdir()
        command = ("sh", "-ceu", f"umask 077\n{script}", "sh", *arguments)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"two_hosts.py: error: no certificates could be made: {done.stderr}")


def move(stack: ExitStack, options: argparse.Namespace) -> int:
    """Make both hosts, move the simulation from one to the other, and compare; the exit status."""
    source, destination = Host(SOURCE, stack), Host(DESTINATION, stack)
    connect(source, destination)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dirtylog-")))
    if not options.plain:
        make_credentials(folder)
    uri = f"{'tcp' if options.plain else 'tls'}:{DESTINATION}:4444"
    command = (*SIMULATION, "--size", options.size, "--steps", str(options.steps))

    def begin(host: Host, what: str) -> Child:
        return host.start(*command, what, uri, *(() if options.plain else ("--tls-creds", str(folder / host.address))))

    receiver = begin(destination, "--receive")
    tell(DESTINATION, line_of(receiver) or result(receiver))
    sent = tell(SOURCE, result(begin(source, "--send")))
    received = tell(DESTINATION, result(receiver))
    (link,) = json.loads(destination.ip("-json", "-statistics", "link", "show", "cable"))
    print(f"{format_size(link['stats64']['rx']['bytes'])} went over the cable")
    return compare(sent, received, result(start(stack, *command, "--undisturbed")))


def tell(host: str, said: str) -> str:
    """Print what was said on a host."""
    for line in said.splitlines():
        print(f"{host}: {line}", flush=True)
    return said


def compare(sent: str, received: str, undisturbed: str) -> int:
    """Whether no step was lost, from what all three simulations said; the exit status."""
    left, arrived = (re.findall(r"at step (\d+)", said) for said in (sent, received))
    whole = left == arrived
    print(f"it left at step {', '.join(left)} and went on at step {', '.join(arrived)}")
    equal = undisturbed in received
    print("an undisturbed simulation ends with the same cells" if equal else "an undisturbed one ends with OTHER cells")
    return 0 if whole and equal else 1


def check_commands(plain: bool) -> None:
    """See that all commands are there."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # where Debian keeps ip
    missing = [name for name in PACKAGES if not shutil.which(name) and not (plain and name == "openssl")]
    if missing:
        packages = " ".join(sorted({PACKAGES[name] for name in missing}))
        raise SystemExit(f"two_hosts.py: error: there is no {', '.join(missing)} here; apt-get install {packages}")


def become_root() -> None:
    """Start anew in a namespace of users, unless this is root."""
    if os.geteuid() == 0:
        return
    probe = subprocess.run([*OWN_USERS, "true"], capture_output=True, check=False)
    if probe.returncode:
        raise SystemExit("two_hosts.py: error: this host lets only root make network namespaces; run it with sudo")
    os.execvp(OWN_USERS[0], [*OWN_USERS, sys.executable, *sys.argv])  # noqa: S606 - with an argument list


def main() -> int:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="1G", help="memory of the simulation (default: 1G)")
    parser.add_argument("--steps", type=int, default=4096, help="of half a MiB each (default: 4096)")
    parser.add_argument("--plain", action="store_true", help="over tcp:, which is not encrypted, instead of tls:")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, and so ends what was started
    check_commands(options.plain)
    become_root()
    try:
        with ExitStack() as stack:
            return move(stack, options)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
