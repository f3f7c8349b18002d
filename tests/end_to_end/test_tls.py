"""Migrations between processes over TLS."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import trustme
from support.connections import HOST
from support.dirtier_runs import Place
from support.processes import Run, dirtylog
from support.tls import EXPIRED, issue
from support.waiting import wait_until

_OPTIONS = ("--accel", "unicorn")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "run").mkdir()
    return Place(tmp_path / "run")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def creds(tmp_path: Path, authority: trustme.CA) -> str:
    return issue(tmp_path / "creds", authority)


@contextmanager
def _pair(place: Place, creds: str) -> Iterator[tuple[Run, Run, str]]:
    """A source, a destination, and where it waits."""
    with (
        place.source(*_OPTIONS) as source,
        place.destination("tls::0", "--tls-creds", creds, *_OPTIONS) as destination,
    ):
        place.wait_for_round(source)
        wait_until(lambda: "waiting for a guest at" in destination.err, "the destination waits")
        (line,) = (line for line in destination.err.splitlines() if "waiting" in line)
        yield source, destination, line.rpartition(" ")[2]


def test_guest_moves_encrypted_on_several_channels_and_on_from_there(place: Place, creds: str) -> None:  # M1
    with _pair(place, creds) as (source, destination, uri):
        assert uri.startswith(f"tls:{HOST}:")
        options = ("--tls-creds", creds, "--channels", "2", "--verify", "--json")
        with dirtylog("migrate", place.path("source.qmp"), uri, *options) as migration:
            assert migration.wait() == 0, migration.err
            report = msgspec.json.decode(migration.out)
        assert report["status"] == "completed"
        assert source.state == "postmigrate"
        place.check_memory(source)
        place.check_runs_on(destination)
        with place.destination("tls::0", "--tls-creds", creds, *_OPTIONS, name="further") as further:
            wait_until(lambda: "waiting for a guest at" in further.err, "it waits")
            where = further.err.split()[-1]
            # the first destination has credentials already
            with dirtylog("migrate", place.path("destination.qmp"), where) as migration:
                assert migration.wait() == 0, migration.err
            place.check_runs_on(further)


def test_sides_that_do_not_accept_each_other_say_why_and_both_go_on(
    place: Place, creds: str, authority: trustme.CA, tmp_path: Path
) -> None:  # M2
    foreign = issue(tmp_path / "foreign", trustme.CA(), trusts=authority)
    expired = issue(tmp_path / "expired", authority, **EXPIRED)
    with _pair(place, creds) as (_, destination, uri):
        for directory, theirs, ours in (
            (foreign, "unknown ca", "unable to get local issuer certificate"),
            (expired, "certificate expired", "certificate has expired"),
        ):
            with dirtylog("migrate", place.path("source.qmp"), uri, "--tls-creds", directory) as migration:
                assert migration.wait() == 5
                assert f"the destination refused the TLS connection: {theirs}" in migration.err
            told = f"dirtylog: refused a connection from {HOST}:"
            cause = f": the source's certificate is not accepted: {ours}"
            wait_until(lambda cause=cause: cause in destination.err, "the destination said why")  # type: ignore[misc]
            *_, line = destination.err.splitlines()
            assert line.startswith(told), line
        with dirtylog("migrate", place.path("source.qmp"), uri, "--tls-creds", creds) as migration:
            assert migration.wait() == 0, migration.err
        place.check_runs_on(destination)
