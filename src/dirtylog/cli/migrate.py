"""``dirtylog migrate``: drive a migration over QMP, and show how it goes."""

import os
import signal
import threading
from contextlib import nullcontext
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.live import Live

from dirtylog.cli.interrupts import interrupts
from dirtylog.cli.migration_report import progress_line, progress_table, report
from dirtylog.cli.options import DURATION, RATE, SIZE
from dirtylog.cli.verdict import verdict_text
from dirtylog.control.migration_info import MigrationInfo
from dirtylog.control.qmp import QMPClient
from dirtylog.errors import CancelledError, PeerError, ProtocolError, UsageError
from dirtylog.migration import Address, Compression, Parameters, Slowdown, parse_address
from dirtylog.migration.address import TLSAddress, UnixAddress
from dirtylog.units import MIB

_POLL_SECONDS: Final = 0.1
_ENDED: Final = frozenset({"completed", "failed", "cancelled"})
_PAUSED: Final = "postcopy-paused"
_HANDED_OVER: Final = "postcopy-"


@click.command("migrate")
@click.argument("qmp_path")
@click.argument("uri")
@click.option(
    "--max-downtime",
    type=DURATION,
    default="300ms",
    show_default=True,
    help="How long the guest may stand still at the switchover. Some 10 ms are always set aside for state.",
)
@click.option("--bandwidth", type=RATE, default=0, help="Send no faster while the guest runs. No limit unless given.")
@click.option(
    "--clear-chunk",
    type=SIZE,
    default="128M",
    show_default=True,
    help="Clear the dirty log in chunks of this size, each right before its first page is read.",
)
@click.option("--channels", type=int, default=1, show_default=True, help="Send memory on so many connections at once.")
@click.option(
    "--compression",
    type=click.Choice([each.value for each in Compression]),
    default=Compression.AUTO.value,
    show_default=True,
    help="Whether to compress memory, batch by batch, where that saves time.",
)
@click.option(
    "--delta-cache",
    type=SIZE,
    default="64M",
    show_default=True,
    help="Keep so much of what was sent, and send what changed, where that saves time; 0 for none.",
)
@click.option(
    "--postcopy-bandwidth",
    type=RATE,
    default=0,
    help="Once the guest has moved, send no faster what it does not wait for. No limit unless given.",
)
@click.option(
    "--switchover-bandwidth",
    type=RATE,
    default=0,
    help="What the link will carry at the switchover, for the estimate of the downtime. As measured unless given.",
)
@click.option(
    "--auto-converge", is_flag=True, help="Throttle the guest, step by step, while it dirties memory too fast."
)
@click.option(
    "--dirty-limit",
    type=RATE,
    metavar="RATE",
    help="Let no vCPU write more than that while the guest dirties memory too fast; whole MiB/s. For --dirty-log ring.",
)
@click.option(
    "--local",
    is_flag=True,
    help="Hand memory over to a process on this host without copying it, whatever its size; for unix:PATH.",
)
@click.option(
    "--postcopy", is_flag=True, help="Hand the guest over at once, and send what it lacks while it runs there."
)
@click.option(
    "--postcopy-after",
    type=click.IntRange(min=1),
    metavar="PASSES",
    help="Do so if it has not converged after so many passes.",
)
@click.option("--resume", is_flag=True, help="Go on with --postcopy whose connection was lost; see 'dirtylog recover'.")
@click.option(
    "--tls-creds",
    metavar="DIR",
    help="Certificates and keys of this side for tls:HOST:PORT; as before, or as 'run' was told, unless given.",
)
@click.option(
    "--tls-hostname",
    metavar="NAME",
    help="The name that the destination's certificate has, if not HOST; as before unless given.",
)
@click.option("--verify", is_flag=True, help="Compare a digest of all memory on both sides before the guest moves.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and no progress.")
def command(
    *,
    qmp_path: str,
    uri: str,
    max_downtime: float,
    bandwidth: int,
    clear_chunk: int,
    channels: int,
    compression: str,
    delta_cache: int,
    postcopy_bandwidth: int,
    switchover_bandwidth: int,
    auto_converge: bool,
    dirty_limit: int | None,
    local: bool,
    postcopy: bool,
    postcopy_after: int | None,
    resume: bool,
    tls_creds: str | None,
    tls_hostname: str | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Migrate the guest whose QMP socket is QMP_PATH to the process that waits at URI.

    URI is what the other side was given with 'dirtylog run --incoming': unix:PATH, tcp:HOST:PORT, or tls:HOST:PORT,
    which is encrypted. Or it is file:PATH, from where 'dirtylog run --incoming file:PATH' runs it later. The guest runs
    on meanwhile, and stays where it is if this fails, or is ended with Ctrl-C. With --postcopy it has moved before its
    memory has: if the connection is lost then, it waits for what it lacks.
    """
    address = parse_address(uri)
    if local:
        _check_local(address, channels)
    if (tls_creds or tls_hostname) and not isinstance(address, TLSAddress):
        raise UsageError(f"{address} is not encrypted, whatever the credentials", remedy="migrate to tls:HOST:PORT")
    parameters = Parameters(
        downtime_limit=max_downtime,
        max_bandwidth=bandwidth,
        max_postcopy_bandwidth=postcopy_bandwidth,
        switchover_bandwidth=switchover_bandwidth,
        clear_chunk=clear_chunk,
        verify=verify,
        share_memory=local,
        channels=channels,
        postcopy=postcopy or postcopy_after is not None,
        postcopy_after=postcopy_after or 0,
        compression=Compression(compression),
        delta_cache=delta_cache,
        **_slowdown(dirty_limit, auto_converge=auto_converge),
    )
    console = Console(quiet=as_json, highlight=False, markup=False, emoji=False)
    with QMPClient(qmp_path) as qmp, interrupts(signal.SIGINT) as interrupted:
        if resume:
            qmp.execute("migrate", uri=uri, resume=True)
        else:
            _begin(qmp, uri, parameters, _tls(tls_creds, tls_hostname))
            if postcopy:
                qmp.execute("migrate-start-postcopy")
        info = _follow(qmp, console, interrupted)
        _check(qmp, info)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(info)).decode())
    else:
        console.print(report(info))


def _check_local(address: Address, channels: int) -> None:
    if channels > 1:
        raise UsageError("--local needs no further channels", remedy="leave one of them out")
    if not isinstance(address, UnixAddress):
        raise UsageError(f"--local cannot hand memory over at {address}", remedy="use unix:PATH on both sides")


def _tls(creds: str | None, hostname: str | None) -> dict[str, str]:
    """The parameters about TLS that were given, for a process whose working directory may be another."""
    given = {"tls_creds": os.path.abspath(creds) if creds else creds, "tls_hostname": hostname}
    return {name: value for name, value in given.items() if value is not None}


def _slowdown(dirty_limit: int | None, *, auto_converge: bool) -> dict[str, Any]:
    """The parameters about a guest that dirties memory too fast."""
    if dirty_limit is None:
        return {"slowdown": Slowdown.AUTO_CONVERGE if auto_converge else Slowdown.NONE}
    if auto_converge:
        raise UsageError("--auto-converge and --dirty-limit exclude each other", remedy="leave one of them out")
    if dirty_limit % MIB:
        raise UsageError(f"a dirty limit of {dirty_limit} bytes a second", remedy="give whole MiB/s, such as 50M")
    return {"slowdown": Slowdown.DIRTY_LIMIT, "vcpu_dirty_limit": dirty_limit // MIB}


def _begin(qmp: QMPClient, uri: str, parameters: Parameters, tls: dict[str, str]) -> None:
    earlier = _query(qmp)
    if earlier is not None and earlier.status not in _ENDED:
        # Parameters would change those of that migration.
        raise UsageError(
            f"the guest is being migrated already ({earlier.status})",
            remedy="wait for that migration to end, or cancel it with migrate_cancel over QMP",
        )
    values = {"xbzrle_cache_size": parameters.delta_cache} if parameters.delta_cache else {}
    if parameters.slowdown is Slowdown.DIRTY_LIMIT:
        values["vcpu_dirty_limit"] = parameters.vcpu_dirty_limit
    qmp.execute(
        "migrate-set-parameters",
        mode="cpr-transfer" if parameters.share_memory else "normal",
        downtime_limit=round(parameters.downtime_limit * 1000),
        max_bandwidth=parameters.max_bandwidth,
        max_postcopy_bandwidth=parameters.max_postcopy_bandwidth,
        avail_switchover_bandwidth=parameters.switchover_bandwidth,
        multifd_channels=parameters.channels,
        multifd_compression="none" if parameters.compression is Compression.NONE else "zstd",
        x_clear_chunk=parameters.clear_chunk,
        x_verify=parameters.verify,
        x_postcopy_after=parameters.postcopy_after,
        **values,
        **tls,
    )
    on = {
        "multifd": parameters.channels > 1,
        "xbzrle": bool(parameters.delta_cache),
        "auto-converge": parameters.slowdown is Slowdown.AUTO_CONVERGE,
        "dirty-limit": parameters.slowdown is Slowdown.DIRTY_LIMIT,
        "postcopy-ram": parameters.postcopy,
    }
    qmp.execute(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": state} for name, state in on.items()],
    )
    qmp.execute("migrate", uri=uri)


def _query(qmp: QMPClient) -> MigrationInfo | None:
    """The last migration, if there was one."""
    reply = qmp.execute("query-migrate")
    try:
        return msgspec.convert(reply, MigrationInfo) if reply else None
    except msgspec.ValidationError as error:
        raise ProtocolError(
            f"the QMP server does not describe migrations as dirtylog does: {error}",
            remedy="name the QMP socket of a 'dirtylog run', of the same version",
        ) from error


def _follow(qmp: QMPClient, console: Console, interrupted: threading.Event) -> MigrationInfo:
    """Show progress until the migration has ended: in place on a terminal, else a line for each change of pass."""
    shown = None
    in_place = console.is_terminal and not (console.is_dumb_terminal or console.quiet)
    with Live(console=console, refresh_per_second=10, transient=True) if in_place else nullcontext() as live:
        while True:
            info = _query(qmp)
            if info is None:
                raise ProtocolError("the QMP server has forgotten the migration")
            now = (info.status, info.ram.dirty_sync_count)
            if live is not None:
                live.update(progress_table(info))
            elif now != shown:
                console.print(progress_line(info), soft_wrap=True)
            shown = now
            if info.status in _ENDED or (info.status == _PAUSED and info.error_desc is not None):
                return info
            if interrupted.is_set():
                interrupted.clear()
                if info.status.startswith(_HANDED_OVER):
                    raise CancelledError("the migration goes on, unwatched: the guest runs on the destination already")
                qmp.execute("migrate_cancel")
            qmp.next_event(_POLL_SECONDS)


def _check(qmp: QMPClient, info: MigrationInfo) -> None:
    """Raise if the migration did not complete, with what became of the guest."""
    if info.status == "completed":
        return
    if info.status == _PAUSED:
        raise PeerError(
            f"the connection was lost, and the guest waits where it is for memory that is here: {info.error_desc}",
            remedy="have the destination wait with 'dirtylog recover', then go on with 'dirtylog migrate --resume'",
        )
    guest = f"the guest is {qmp.execute('query-status')['status']} on the source"
    if info.status == "cancelled":
        never = info.x_verdict is not None and info.x_verdict.converges is False
        verdict = f", and {verdict_text(info)}" if never else ""
        raise CancelledError(f"the migration was cancelled{verdict}; {guest}")
    raise PeerError(f"the migration failed, {guest}: {info.error_desc or 'no reason was given'}")
