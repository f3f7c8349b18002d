"""``dirtylog migrate``: drive a migration over QMP, and show how it goes."""

from contextlib import nullcontext
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.live import Live

from dirtylog.cli.migration_report import progress_line, progress_table, report
from dirtylog.cli.options import DURATION, RATE, SIZE
from dirtylog.control.qmp import QMPClient
from dirtylog.errors import CancelledError, PeerError

_POLL_SECONDS: Final = 0.1
_ENDED: Final = frozenset({"completed", "failed", "cancelled"})


@click.command("migrate")
@click.argument("qmp_path")
@click.argument("uri")
@click.option(
    "--max-downtime",
    type=DURATION,
    default="300ms",
    show_default=True,
    help="How long the guest may stand still at the switchover.",
)
@click.option("--bandwidth", type=RATE, default=0, help="Send no faster while the guest runs. No limit unless given.")
@click.option(
    "--clear-chunk",
    type=SIZE,
    default="128M",
    show_default=True,
    help="Clear the dirty log in chunks of this size, each right before its first page is read.",
)
@click.option("--verify", is_flag=True, help="Compare a digest of all memory on both sides before the guest moves.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and no progress.")
def command(
    qmp_path: str, uri: str, max_downtime: float, bandwidth: int, clear_chunk: int, verify: bool, as_json: bool
) -> None:
    """Migrate the guest whose QMP socket is QMP_PATH to the process that waits at URI.

    URI is what the other side was given with 'dirtylog run --incoming': unix:PATH or tcp:HOST:PORT. The guest runs on
    meanwhile, and stays where it is if this fails, or is ended with Ctrl-C.
    """
    with QMPClient(qmp_path) as qmp:
        qmp.execute(
            "migrate-set-parameters",
            downtime_limit=round(max_downtime * 1000),
            max_bandwidth=bandwidth,
            x_clear_chunk=clear_chunk,
            x_verify=verify,
        )
        qmp.execute("migrate", uri=uri)
        try:
            info = _follow(qmp, Console(quiet=as_json, highlight=False))
        except KeyboardInterrupt:
            info = _cancel(qmp)
        _check(qmp, info)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(info)).decode())
    else:
        Console(highlight=False).print(report(info))


def _follow(qmp: QMPClient, console: Console) -> dict[str, Any]:
    """Show progress until the migration has ended: in place on a terminal, else a line for each change of pass."""
    shown = None
    with Live(console=console, refresh_per_second=10, transient=True) if console.is_terminal else nullcontext() as live:
        while True:
            info: dict[str, Any] = qmp.execute("query-migrate")
            now = (info["status"], len(info.get("x-passes", ())))
            if live is not None:
                live.update(progress_table(info))
            elif now != shown:
                console.print(progress_line(info), soft_wrap=True)
            shown = now
            if info["status"] in _ENDED:
                return info
            qmp.next_event(_POLL_SECONDS)


def _cancel(qmp: QMPClient) -> dict[str, Any]:
    qmp.execute("migrate_cancel")
    while True:
        info: dict[str, Any] = qmp.execute("query-migrate")
        if info["status"] in _ENDED:
            return info
        qmp.next_event(_POLL_SECONDS)


def _check(qmp: QMPClient, info: dict[str, Any]) -> None:
    """Raise if the migration did not complete, with what became of the guest."""
    if info["status"] == "completed":
        return
    state = qmp.execute("query-status")["status"]
    guest = f"the guest is {state} on the source"
    if info["status"] == "cancelled":
        raise CancelledError(f"the migration was cancelled; {guest}")
    raise PeerError(f"the migration failed, {guest}: {info.get('error-desc', 'no reason was given')}")
