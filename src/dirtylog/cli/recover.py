"""``dirtylog recover``: the destination's part in going on after a lost connection."""

import click

from dirtylog.control.qmp import QMPClient
from dirtylog.migration import parse_address


@click.command("recover")
@click.argument("qmp_path")
@click.argument("uri")
def command(*, qmp_path: str, uri: str) -> None:
    """Have the guest whose QMP socket is QMP_PATH wait at URI for the memory that it lacks.

    It was migrated here with 'dirtylog migrate --postcopy', and the connection was lost. 'dirtylog migrate --resume' on
    the source goes on from there.
    """
    parse_address(uri)
    with QMPClient(qmp_path) as qmp:
        qmp.execute("migrate-recover", uri=uri)
    click.echo(f"waiting for the source at {uri}")
