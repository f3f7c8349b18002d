"""``dirtylog doctor``: what this host offers."""

from dataclasses import asdict
from itertools import groupby

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dirtylog.errors import HostError
from dirtylog.linux.probe import Finding, HostReport, probe_host

_WIDEST = 100


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option(
    "--require", "required", metavar="NAME", multiple=True, help="Exit with status 3 if NAME is missing. Repeatable."
)
def command(as_json: bool, required: tuple[str, ...]) -> None:
    """Show what this host offers to dirtylog, what is missing, and how to get it.

    Everything is tried or asked of the kernel. Nothing is changed, and no privilege is needed, though without it less
    may be found.
    """
    report = probe_host()
    findings = {finding.name: finding for finding in report.findings}
    for name in required:
        if name not in findings:
            raise click.BadParameter(
                f"there is no {name!r} in the report, only {', '.join(findings)}", param_hint="'--require'"
            )
    if as_json:
        click.echo(_as_json(report))
    else:
        _show(report)
    missing = [findings[name] for name in required if not findings[name].available]
    if missing:
        remedy = missing[0].remedy if len(missing) == 1 else "the report has a remedy for each"
        raise HostError(f"this host lacks {', '.join(finding.name for finding in missing)}", remedy=remedy)


def _as_json(report: HostReport) -> str:
    content = asdict(report) | {"missing_essentials": [finding.name for finding in report.missing_essentials]}
    return msgspec.json.format(msgspec.json.encode(content)).decode()


def _show(report: HostReport) -> None:
    console = Console(highlight=False, emoji=False)
    console.width = min(console.width, _WIDEST)
    console.print(f"Linux {report.kernel} on {report.machine}", markup=False)
    names = max(len(finding.name) for finding in report.findings)
    for group, findings in groupby(report.findings, lambda finding: finding.group):
        console.print()
        console.print(Text(group, "bold"))
        console.print(_table(list(findings), names))
    console.print()
    console.print(_verdict(report))


def _table(findings: list[Finding], name_width: int) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(width=3)
    table.add_column(width=name_width)
    table.add_column(overflow="fold")
    shown = None
    for finding in findings:
        text = Text(finding.purpose)
        if finding.detail:
            text.append(f" ({finding.detail})")
        if finding.remedy not in (None, shown):
            text.append(f"\nremedy: {finding.remedy}", "yellow")
        shown = finding.remedy
        table.add_row(_mark(finding), finding.name, text)
    return table


def _mark(finding: Finding) -> Text:
    if finding.available:
        return Text("yes", "green")
    return Text("no", "red" if finding.essential else "yellow")


def _verdict(report: HostReport) -> Text:
    missing = report.missing_essentials
    if not missing:
        return Text("KVM guests can be run and migrated here.", "bold green")
    names = ", ".join(finding.name for finding in missing)
    return Text(f"KVM guests cannot be run here without: {names}.", "bold red")
