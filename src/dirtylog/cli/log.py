"""What the library logs, on standard error."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import click

from dirtylog.cli.text import printable


class _StandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            for line in self.format(record).splitlines():
                click.echo(f"dirtylog: {printable(line)}", err=True)
        except OSError:  # nobody reads it any more
            self.handleError(record)


@contextmanager
def shown_log() -> Iterator[None]:
    """Show warnings of the library while this lasts."""
    logger, handler = logging.getLogger("dirtylog"), _StandardError(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
