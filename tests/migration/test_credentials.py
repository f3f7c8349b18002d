import os
import shutil
import subprocess
from pathlib import Path

import pytest
import trustme
from support.require import require
from support.tls import issue

from dirtylog.errors import UsageError
from dirtylog.migration.address import Address, FileAddress, TCPAddress, TLSAddress, UnixAddress
from dirtylog.migration.credentials import Credentials, credentials_for, socket_address
from dirtylog.migration.protocol import Role

_FILES = {
    Role.SOURCE: ("ca-cert.pem", "client-cert.pem", "client-key.pem"),
    Role.DESTINATION: ("ca-cert.pem", "server-cert.pem", "server-key.pem"),
}
_BOTH = pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
_EACH_FILE = pytest.mark.parametrize(
    ("role", "name"), [(role, name) for role, names in _FILES.items() for name in names], ids=str
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(issue(tmp_path / "tls", trustme.CA()))


def _refused(directory: Path | str, role: Role) -> UsageError:
    with pytest.raises(UsageError) as caught:
        Credentials.load(str(directory), role)
    assert caught.value.remedy
    return caught.value


@_BOTH
def test_role_needs_its_own_files_only(directory: Path, role: Role) -> None:
    for path in directory.iterdir():
        if path.name not in _FILES[role]:
            path.unlink()
    assert Credentials.load(str(directory), role).role is role


@_EACH_FILE
def test_missing_file_is_named(directory: Path, role: Role, name: str) -> None:
    (directory / name).unlink()
    error = _refused(directory, role)
    assert error.cause == f"the TLS credentials '{directory}/{name}' cannot be read: No such file or directory"


@_EACH_FILE
def test_what_is_no_file_is_named_and_not_waited_for(directory: Path, role: Role, name: str) -> None:
    (directory / name).unlink()
    os.mkfifo(directory / name)
    assert (
        _refused(directory, role).cause == f"the TLS credentials '{directory}/{name}' cannot be read: it is not a file"
    )


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"]
)
@_EACH_FILE
def test_broken_file_is_named(directory: Path, role: Role, name: str, content: bytes) -> None:
    (directory / name).write_bytes(content)
    assert f"{directory}/{name} " in _refused(directory, role).cause


@_BOTH
def test_key_of_another_certificate_is_refused(directory: Path, tmp_path: Path, role: Role) -> None:
    other = Path(issue(tmp_path / "other", trustme.CA()))
    key = _FILES[role][2]
    (directory / key).write_bytes((other / key).read_bytes())
    assert _refused(directory, role).cause.endswith("key values mismatch")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610])
@_BOTH
def test_key_that_is_open_to_others_is_refused(directory: Path, role: Role, mode: int) -> None:
    key = directory / _FILES[role][2]
    key.chmod(mode)
    error = _refused(directory, role)
    assert error.cause == f"the private key {key} is open to others than its owner (its mode is {mode:04o})"
    assert error.remedy == f"chmod 600 {key}"


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_key_that_only_its_owner_reads_is_taken(directory: Path, mode: int) -> None:
    (directory / "client-key.pem").chmod(mode)
    Credentials.load(str(directory), Role.SOURCE)


def test_key_with_a_passphrase_is_refused_and_nobody_is_asked(directory: Path) -> None:
    require("openssl", shutil.which("openssl"), "openssl is not installed")
    key = directory / "client-key.pem"
    locked = directory / "locked.pem"
    command = ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True)
    locked.rename(key)
    error = _refused(directory, Role.SOURCE)
    assert error.cause == f"the private key {key} is protected by a passphrase, and nobody can be asked for it"


@pytest.mark.parametrize("name", ["", "nowhere", "zero\0byte", "surrogate\udc00\ud800", "x" * 5000])
def test_directory_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    assert "cannot be read" in _refused(f"{tmp_path}/{name}", Role.SOURCE).cause


@pytest.mark.parametrize("hostname", [".example.org", "two..dots", "zero\0byte", "x" * 64, "x." * 127])
def test_hostname_that_cannot_be_is_refused(directory: Path, hostname: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a host"):
        Credentials.load(str(directory), Role.SOURCE, hostname)


_PLAIN: tuple[Address, ...] = (UnixAddress("x"), FileAddress("x"), TCPAddress("host", 1))


class TestCredentialsFor:
    def test_encrypted_address_has_those_of_the_directory(self, directory: Path) -> None:
        found = credentials_for(TLSAddress("host", 1), str(directory), Role.SOURCE, "name")
        assert found is not None
        assert (found.role, found.hostname) == (Role.SOURCE, "name")

    def test_encrypted_address_without_a_directory_is_refused(self) -> None:
        with pytest.raises(UsageError, match="tls:host:1 needs credentials") as caught:
            credentials_for(TLSAddress("host", 1), "", Role.SOURCE)
        assert caught.value.remedy == "name their directory with --tls-creds (in QMP: the parameter tls-creds)"

    def test_network_that_would_not_be_encrypted_is_refused(self) -> None:
        with pytest.raises(UsageError, match="tcp:host:1 would not be encrypted") as caught:
            credentials_for(TCPAddress("host", 1), "directory", Role.SOURCE)
        assert caught.value.remedy == "use tls:host:1, or leave tls-creds empty"

    @pytest.mark.parametrize("address", _PLAIN[:2], ids=str)
    def test_what_stays_on_this_host_needs_none_and_may_have_some(self, address: Address) -> None:
        assert credentials_for(address, "directory", Role.SOURCE) is None

    @pytest.mark.parametrize("address", _PLAIN, ids=str)
    def test_without_a_directory_there_are_none(self, address: Address) -> None:
        assert credentials_for(address, "", Role.SOURCE) is None


class TestSocketAddress:
    @pytest.fixture
    def credentials(self, directory: Path) -> Credentials:
        return Credentials.load(str(directory), Role.SOURCE)

    def test_file_is_refused(self) -> None:
        with pytest.raises(UsageError, match="nobody can connect to file:x"):
            socket_address(FileAddress("x"), None)

    def test_encrypted_one_without_credentials_is_refused(self) -> None:
        with pytest.raises(UsageError, match="tls:host:1 lacks credentials"):
            socket_address(TLSAddress("host", 1), None)

    @pytest.mark.parametrize("address", [UnixAddress("x"), TCPAddress("host", 1)], ids=str)
    def test_plain_one_with_credentials_is_refused(self, credentials: Credentials, address: Address) -> None:
        with pytest.raises(UsageError, match="has no use for credentials"):
            socket_address(address, credentials)

    def test_what_fits_is_taken(self, credentials: Credentials) -> None:
        address = TLSAddress("host", 1)
        assert socket_address(address, credentials) is address
